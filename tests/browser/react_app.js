// An application with the hooks of the JavaScript client, bundled for each release of React by `test_react.py`.

import { StrictMode, createElement as h } from 'react';
import { createRoot } from 'react-dom/client';

import { CatbusClient } from '../../clients/javascript/src/catbus.js';
import { CatbusProvider, useConnectionState, useMessages, usePresence, usePublish, useRetained, useSubscription } from '../../clients/javascript/src/react.js';

function Room({ id, pattern, last }) {
  const { messages, live, error } = useMessages(pattern, { last });
  return h('pre', { id }, JSON.stringify([messages.map(({ payload }) => payload), live, error?.code ?? null]));
}

function Counter({ pattern }) {
  const state = useConnectionState();
  const publish = usePublish();
  useSubscription(pattern, ({ payload }) => (window.counted.push(payload), undefined));
  window.publish = publish;
  return h('pre', { id: 'state' }, state);
}

function Shared({ pattern }) {
  const retained = useRetained(pattern);
  const people = usePresence(pattern);
  const publish = usePublish();
  window.publish = publish;
  const payloads = [...retained.entries].map(([channel, { payload }]) => [channel, payload]);
  const members = [...people.entries].flatMap(([channel, present]) => present.map(({ clientId, sessions }) => [channel, clientId, sessions]));
  return h('pre', { id: 'shared' }, JSON.stringify([payloads, members, retained.ready && people.ready, retained.error?.code ?? null]));
}

window.counted = [];
document.body.innerHTML = '<div id="root"></div>';
const root = createRoot(document.getElementById('root'));

/** Show the application. Each `user` has a client; without a user, nobody is signed in. */
const clients = new Map();
window.show = ({ url, user, token, pattern, last = 3, rooms = 2, shared = [] }) => {
  if (!user) return root.render(h(StrictMode, null, h('pre', { id: 'state' }, 'signed out')));
  if (!clients.has(user)) clients.set(user, new CatbusClient({ url, token }));
  // The effect of a provider runs after those of its children.
  root.render(
    h(StrictMode, null,
      h(CatbusProvider, { client: clients.get(user) },
        ...shared.map((each, key) => h(Shared, { key, pattern: each })),
        pattern && h(Counter, { pattern }),
        ...['one', 'two'].slice(0, pattern ? rooms : 0).map((id) => h(Room, { key: id, id, pattern, last })))),
  );
};
window.join = (user, channel) => clients.get(user).join(channel).ready.then(() => true);
window.text = (id) => document.getElementById(id)?.textContent ?? null;
