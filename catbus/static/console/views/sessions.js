// The sessions of this replica: transport, address, lag, and what an administrator can do about them.

import { segment } from '../api.js';
import { button, field, form, h, table, title } from '../elements.js';
import { ago, bytes, count } from '../format.js';
import { poll } from '../polling.js';

export function sessionsView(place, { api, signal }) {
  const content = h('div', {});
  const pages = [undefined]; // the `after` of each page up to the one that is shown
  let clientId = '';

  const refresh = poll(content, signal, 3000, async () => {
    const query = { client_id: clientId, limit: 50, after: pages.at(-1) };
    const page = await api('api/sessions', { query, signal });
    return [
      h('p', { class: 'quiet' }, `${count(page.open)} sessions on ${page.replica}.`),
      show(page.sessions, api, () => refresh()),
      h('p', {},
        pages.length > 1 && button('Previous', () => { pages.pop(); refresh(); }), ' ',
        page.next !== null && button('Next', () => { pages.push(page.next); refresh(); })),
    ];
  });
  place.append(
    ...title('Sessions', 'The open sessions of the replica that serves this page.'),
    form(({ client_id: wanted }) => {
      clientId = wanted;
      pages.length = 1;
      refresh();
    }, field('Client ID', { name: 'client_id', placeholder: 'all' }, 'wide'), h('button', { class: 'main' }, 'Filter')),
    content);
}

function show(sessions, api, refresh) {
  const act = (text, action, clientId, question) => button(text, async () => {
    await api(`api/clients/${segment(clientId)}/${action}`, { method: 'POST' });
    refresh();
  }, { confirmation: question });
  return table('Sessions', [
    { name: 'Client', cell: ({ client_id: id, admin, state }) => id ?? h('span', { class: 'quiet' }, admin ? 'admin key' : state) },
    { name: 'Transport', cell: ({ transport }) => transport },
    { name: 'Address', cell: ({ network }) => network },
    { name: 'Opened', kind: 'time', cell: ({ opened }) => ago(opened) },
    { name: 'Subscriptions', kind: 'value', cell: ({ subscriptions, patterns }) => `${patterns.join(', ')}${subscriptions > patterns.length ? ` and ${subscriptions - patterns.length} more` : ''}` },
    { name: 'Lag', kind: 'number', cell: ({ lag, lagging }) => (lagging ? h('span', { class: 'bad' }, count(lag)) : '0') },
    { name: 'Queued', kind: 'number', cell: ({ queued }) => bytes(queued) },
    { name: 'Published', kind: 'number', cell: ({ published }) => count(published) },
    { name: 'Delivered', kind: 'number', cell: ({ delivered }) => count(delivered) },
    {
      name: 'Actions',
      kind: 'actions',
      cell: ({ client_id: id }) => id && h('span', {},
        act('Disconnect', 'disconnect', id, `Close all sessions of ${id}? It may connect again.`), ' ',
        act('Revoke', 'revoke', id, `Revoke all tokens that ${id} has now? It needs a new one to connect again.`)),
    },
  ], sessions, 'No session.');
}
