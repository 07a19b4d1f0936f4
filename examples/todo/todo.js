// A shared to-do list, without a framework. `drafts.js` has what is not about this page.

import { bus, showState, user } from '../session.js';
import { Drafts } from './drafts.js';

const $ = (selector, within = document) => within.querySelector(selector);
const rows = new Map(); // channel -> element

showState($('#state'));
bus.connect();
const drafts = new Drafts((...message) => bus.publish(...message), `drafts of ${user}`);
const todos = await bus.retained('todo.*', { onEnd: ({ message }) => { $('#state').textContent = message; } });

function addRow(channel) {
  const row = $('#row').content.cloneNode(true).firstElementChild;
  const [text, check] = [$('.text', row), $('.check', row)];
  const now = (change) => {
    drafts.edit(channel, change);
    drafts.save(channel);
  };
  text.oninput = () => drafts.edit(channel, { text: text.value });
  text.onchange = () => drafts.save(channel);
  check.onchange = () => now({ done: check.checked });
  $('.remove', row).onclick = () => now(null);
  $('.keep', row).onclick = () => drafts.keepMine(channel);
  $('.take', row).onclick = () => drafts.takeTheirs(channel);
  rows.set(channel, row);
  return row;
}

function render() {
  const list = $('#list');
  const shown = new Set(drafts.items.map(({ channel }) => channel));
  for (const [channel, row] of rows) {
    if (!shown.has(channel)) {
      row.remove();
      rows.delete(channel);
    }
  }
  drafts.items.forEach(({ channel, text, done, status, why, removes }, index) => {
    const row = rows.get(channel) ?? addRow(channel);
    if (list.children[index] !== row) list.insertBefore(row, list.children[index]);
    if ($('.text', row).value !== text) $('.text', row).value = text;
    $('.check', row).checked = done;
    row.className = [done && 'done', status && 'unsaved', status].filter(Boolean).join(' ');
    $('.note', row).hidden = !status;
    $('.why', row).textContent = why ?? '';
    $('.keep', row).hidden = $('.take', row).hidden = !status || status === 'waiting';
    $('.keep', row).textContent = removes ? 'Remove it' : 'Keep mine';
  });
  $('.empty').hidden = drafts.items.length > 0;
}

$('#add').onsubmit = (event) => {
  event.preventDefault();
  drafts.add($('#add').elements.text.value);
  $('#add').reset();
};
drafts.onChange(render);
todos.onChange(() => drafts.show(todos));
drafts.show(todos);
$('#add').hidden = false;
