// A chat room, without a framework: the last messages and then new ones, who is here, and who is typing.

import { bus, hueOf, showState, user } from '../session.js';
import { ROOM, TYPING, TYPING_INTERVAL, TYPING_SHOWN, describeTypists, timeOf } from './room.js';

const $ = (selector, within = document) => within.querySelector(selector);
const onEnd = ({ message }) => { $('#state').textContent = message; };

showState($('#state'));
bus.connect();

/** A copy of a template about somebody, with the first letter of the name. */
function copy(template, name) {
  const item = $(template).content.cloneNode(true).firstElementChild;
  $('.person', item).textContent = name.slice(0, 1);
  $('.person', item).style.setProperty('--hue', hueOf(name));
  $('.name', item).textContent = name;
  return item;
}

// Messages

function addLine(line) {
  const list = $('#messages');
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 50;
  list.append(line);
  if (atEnd) line.scrollIntoView({ block: 'nearest' });
}

/** Text of users is text, never HTML. */
function lineOf(text, sender, at) {
  const line = copy('#message', sender);
  line.classList.toggle('mine', sender === user);
  $('time', line).textContent = timeOf(at);
  $('.said', line).textContent = text;
  return line;
}

function addGap() {
  const line = document.createElement('li');
  line.className = 'gap';
  line.textContent = 'Some messages are missing here.';
  addLine(line);
}

bus.subscribe(ROOM, ({ payload, sender, at }) => {
  addLine(lineOf(payload.text, sender, at));
  stopTyping(sender);
}, { last: 50, onGap: addGap, onEnd });

async function send(text) {
  const line = lineOf(text, user, Date.now());
  line.classList.add('pending');
  addLine(line);
  try {
    await bus.publish(ROOM, { text }); // without a connection, it waits for one
    line.remove(); // The subscription shows the message in its place in the order of all.
  } catch ({ message }) {
    line.classList.replace('pending', 'failed');
    $('time', line).textContent = `not sent: ${message}`;
  }
}

// Who is here

bus.join(ROOM, undefined, { onEnd });
bus.presence(ROOM, { onEnd }).then((people) => {
  const showPeople = () => {
    const names = (people.get(ROOM) ?? []).map(({ clientId }) => clientId).sort();
    $('#people').replaceChildren(...names.map((name) => copy('#person', name)));
  };
  people.onChange(({ action, member }) => {
    if (action === 'leave') stopTyping(member.clientId);
    showPeople();
  });
  showPeople();
});

// Who is typing: ephemeral messages, which are not in the log

const typists = new Map(); // name -> timer
let lastSign = -Infinity;

const showTyping = () => { $('#typing').textContent = describeTypists([...typists.keys()]); };

function stopTyping(name) {
  clearTimeout(typists.get(name));
  typists.delete(name);
  showTyping();
}

bus.subscribe(TYPING, ({ sender }) => {
  clearTimeout(typists.get(sender));
  typists.set(sender, setTimeout(stopTyping, TYPING_SHOWN, sender));
  showTyping();
}, { onEnd });

$('#send').elements.text.oninput = () => {
  if (performance.now() - lastSign < TYPING_INTERVAL) return;
  lastSign = performance.now();
  // `echo: false`: this page does not get it. Without a connection it is lost, and nobody misses it.
  bus.publish(TYPING, true, { ephemeral: true, echo: false }).catch(() => {});
};

$('#send').onsubmit = (event) => {
  event.preventDefault();
  send($('#send').elements.text.value);
  $('#send').reset();
  lastSign = -Infinity;
};
$('#send').hidden = false;
