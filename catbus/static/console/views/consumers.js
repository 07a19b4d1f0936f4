// Consumers: how far each is behind, and the messages that it has rejected.

import { segment } from '../api.js';
import { button, h, table, title } from '../elements.js';
import { ago, count, duration, json } from '../format.js';
import { poll } from '../polling.js';

export function consumersView(place, { api, parameters, signal }) {
  const content = h('div', {});
  place.append(...title('Consumers', 'Named positions in the log, for transactions that process each message exactly once.'), content);
  const name = parameters.get('name');
  const refresh = poll(content, signal, 3000, async () => {
    if (name) return showConsumer(await api(`api/consumers/${segment(name)}`, { signal }), await lettersOf(api, name, signal), api, () => refresh());
    try {
      return showConsumers(await api('api/consumers', { query: { limit: 1000 }, signal }));
    } catch (error) {
      if (error.status !== 404) throw error;
      return h('p', { class: 'quiet' }, 'The log is in memory, where it has no consumers.');
    }
  });
}

const lettersOf = async (api, name, signal) => (await api(`api/consumers/${segment(name)}/dead`, { query: { limit: 100 }, signal })).letters;

const POSITION = [
  { name: 'Lag', kind: 'number', cell: ({ lag }) => count(lag) },
  { name: 'Behind', kind: 'number', cell: ({ lag_seconds: seconds }) => (seconds ? duration(seconds) : '0') },
  { name: 'Dead letters', kind: 'number', cell: ({ dead_letters: dead }) => (dead ? h('span', { class: 'bad' }, count(dead)) : '0') },
  { name: 'State', cell: ({ gap }) => (gap ? h('span', { class: 'bad' }, 'messages are gone') : 'complete') },
];

const showConsumers = ({ consumers }) => table('Consumers', [
  { name: 'Name', cell: ({ consumer }) => h('a', { href: `#consumers?${new URLSearchParams({ name: consumer })}` }, consumer) },
  { name: 'Pattern', kind: 'mono', cell: ({ pattern }) => pattern },
  { name: 'Role', cell: ({ owner }) => owner },
  { name: 'Partitions', kind: 'number', cell: ({ partitions }) => count(partitions.length) },
  ...POSITION,
], consumers, 'No consumer. `catbus consumer create` makes one.');

function showConsumer({ consumer, pattern, owner, hold, partitions }, letters, api, refresh) {
  const act = (text, path, seqs, question) => button(text, async () => {
    await api(`api/consumers/${segment(consumer)}/${path}`, { method: 'POST', body: { seqs } });
    refresh();
  }, { confirmation: question });
  return [
    h('h2', {}, consumer),
    h('p', {}, h('code', {}, pattern), ` · role ${owner}${hold ? ' · retention waits for it' : ''} · `, h('a', { href: '#consumers' }, 'all consumers')),
    table('Partitions', [
      { name: 'Partition', kind: 'number', cell: ({ partition }) => partition },
      { name: 'Cursor', kind: 'number', cell: ({ cursor }) => count(cursor) },
      ...POSITION,
      { name: 'Moved', kind: 'time', cell: ({ moved }) => ago(moved) },
    ], partitions),
    h('h2', {}, 'Dead letters'),
    table('Dead letters', [
      { name: 'Seq', kind: 'number', cell: ({ seq }) => count(seq) },
      { name: 'Channel', kind: 'mono', cell: ({ channel }) => channel },
      { name: 'Payload', kind: 'value', cell: ({ payload }) => json(payload) },
      { name: 'Reason', cell: ({ reason }) => reason ?? '' },
      { name: 'Rejected', kind: 'time', cell: ({ rejected }) => ago(rejected) },
      {
        name: 'Actions',
        kind: 'actions',
        cell: ({ seq }) => h('span', {},
          act('Publish again', 'dead/publish', [seq], `Publish message ${seq} again, as a new message for everybody?`), ' ',
          act('Delete', 'dead/delete', [seq], `Delete the dead letter ${seq}?`)),
      },
    ], letters, 'No message was rejected.'),
  ];
}
