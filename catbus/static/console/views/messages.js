// The messages of a pattern: the last ones, then new ones. And a form to publish.

import { errorBox, field, form, h, title } from '../elements.js';
import { count, json, time } from '../format.js';

const SHOWN = 500; // rows; older ones are removed

export function messagesView(place, { client, parameters, signal }) {
  const rows = h('tbody', { id: 'messages' });
  const note = h('p', { class: 'quiet', role: 'status' }, 'Choose a pattern.');
  let watching = new AbortController();
  signal.addEventListener('abort', () => watching.abort());

  const add = (row) => {
    rows.prepend(row);
    if (rows.childElementCount > SHOWN) rows.lastElementChild.remove();
  };

  const watch = (pattern, last) => {
    watching.abort();
    watching = new AbortController();
    const { signal: mine } = watching;
    rows.replaceChildren();
    note.textContent = `Subscribing to ${pattern} …`;
    const began = performance.now();
    let received = 0;
    client.subscribe(pattern, (message) => {
      received += 1;
      add(messageRow(message));
      note.textContent = `${count(received)} messages in ${Math.round((performance.now() - began) / 1000)} s.`;
    }, {
      signal: mine,
      ...(last > 0 ? { last } : {}),
      onGap: ({ from, to, reason }) => add(h('tr', {}, h('td', { colspan: 5, class: 'bad' }, `Messages ${from} to ${to} may be missing (${reason}).`))),
      onLive: () => { if (!received) note.textContent = 'Subscribed. No message yet.'; },
      onEnd: (error) => note.replaceChildren(errorBox(error)),
    }).ready.catch(() => {}); // `onEnd` shows it.
  };

  const pattern = parameters.get('pattern') ?? '';
  const choose = form((values) => {
    history.replaceState(null, '', `#messages?${new URLSearchParams({ pattern: values.pattern })}`);
    watch(values.pattern, Number(values.last));
  },
  field('Pattern', { name: 'pattern', required: true, value: pattern, placeholder: 'orders.* or *' }, 'wide'),
  field('The last', { name: 'last', type: 'number', min: 0, max: 1000, value: 50, class: 'narrow' }),
  h('button', { class: 'main' }, 'Watch'),
  h('button', { type: 'button', click: () => { watching.abort(); note.textContent = 'Stopped.'; } }, 'Stop'));

  place.append(
    ...title('Messages', 'Watch a channel or a pattern live, with its last messages first.'),
    choose,
    h('details', {}, h('summary', {}, 'Publish a message'), publishForm(client, pattern)),
    note,
    h('div', { class: 'scroll', role: 'region', 'aria-label': 'Messages', tabindex: 0 },
      h('table', {},
        h('thead', {}, h('tr', {}, ['Seq', 'Time', 'Channel', 'Payload', 'Sender'].map((name, index) => (
          h('th', { scope: 'col', class: index === 0 && 'number' }, name))))),
        rows)));
  if (pattern) watch(pattern, 50);
}

function messageRow({ seq, at, channel, payload, sender, ephemeral, retain }) {
  const marks = [ephemeral && 'ephemeral', retain && 'retained'].filter(Boolean).join(', ');
  return h('tr', {},
    h('td', { class: 'number' }, seq ? count(seq) : '–'),
    h('td', {}, time(at)),
    h('td', { class: 'mono' }, channel),
    h('td', { class: 'value' }, json(payload), marks && h('span', { class: 'quiet' }, ` (${marks})`)),
    h('td', {}, sender ?? ''));
}

function publishForm(client, pattern) {
  return form(async ({ channel, payload, kind }, place) => {
    const options = { ephemeral: kind === 'ephemeral', retain: kind === 'retained' };
    const { seq } = await client.publish(channel, parseJson(payload), options);
    place.replaceChildren(h('p', { class: 'good' }, seq === undefined ? 'Sent.' : `Committed as ${count(seq)}.`));
  },
  field('Channel', { name: 'channel', required: true, value: pattern.includes('*') ? '' : pattern, placeholder: 'orders.7' }, 'wide'),
  h('label', {}, 'Kind', h('select', { name: 'kind' },
    h('option', { value: '' }, 'kept in the log'),
    h('option', { value: 'retained' }, 'retained'),
    h('option', { value: 'ephemeral' }, 'ephemeral'))),
  h('label', { class: 'wide' }, 'Payload (JSON)', h('textarea', { name: 'payload', required: true, spellcheck: 'false' }, '{"hello": "world"}')),
  h('button', { class: 'main' }, 'Publish'));
}

/** Parse JSON from a form. Raises an error that says what is expected. */
export function parseJson(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`The payload is not JSON: ${error.message}. A text needs quotes: "hello".`);
  }
}
