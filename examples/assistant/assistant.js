// Questions to a language model. The answers are written while the page watches, on all pages of the user.

import { bus, showState, user } from '../session.js';

const $ = (selector, within = document) => within.querySelector(selector);
const rows = new Map(); // channel -> {element, stream}

showState($('#state'));
bus.connect();
const answers = await bus.retained(`answers.${user}.*`);

function show(channel, message) {
  if (!rows.has(channel)) rows.set(channel, { element: addRow(channel) });
  const row = rows.get(channel);
  const { question, text, state } = message.payload;
  row.element.dataset.state = state;
  $('.question', row.element).textContent = question;
  $('.cancel', row.element).hidden = state !== 'writing';
  $('.note', row.element).textContent = { asked: 'thinking …', writing: '', done: '' }[state] ?? state;
  if (state === 'writing' && !row.stream) {
    // The pieces come after this message in the one order of the log, whenever this page was opened.
    const append = ({ payload }) => $('.text', row.element).append(payload);
    row.stream = bus.subscribe(channel.replace('answers.', 'tokens.'), append, { since: message.seq });
  } else if (text) {
    row.stream?.close();
    $('.text', row.element).textContent = text;
  }
}

function addRow(channel) {
  const element = $('#row').content.cloneNode(true).firstElementChild;
  $('.cancel', element).onclick = () => {
    const { payload, seq } = answers.get(channel);
    // If it has ended meanwhile, there is nothing to cancel.
    bus.publish(channel, { ...payload, state: 'cancelling' }, { retain: true, expect: seq }).catch(() => {});
  };
  $('#answers').append(element);
  return element;
}

$('#ask').onsubmit = (event) => {
  event.preventDefault();
  const question = $('#ask').elements.question.value;
  bus.publish(`answers.${user}.${Date.now()}`, { question, text: '', state: 'asked' }, { retain: true, expect: 0 });
  $('#ask').reset();
};
answers.onChange(({ channel, message }) => message && show(channel, message));
for (const [channel, message] of [...answers].sort(([one], [other]) => (one < other ? -1 : 1))) show(channel, message);
$('#ask').hidden = false;
