// The retained messages of a pattern, live, with changes by compare-and-set.

import { button, field, form, h, table, title } from '../elements.js';
import { ago, count, json } from '../format.js';
import { liveMapView } from '../live_map_view.js';
import { parseJson } from './messages.js';

const SHOWN = 500;

export function retainedView(place, { client, parameters, signal }) {
  liveMapView(place, {
    name: 'retained',
    heading: title('Retained messages', 'The newest retained message of each channel. A change succeeds only if nobody else was faster.'),
    open: (pattern, options) => client.retained(pattern, options),
    show: (map) => show(client, map),
    extra: [button('New …', () => edit(client, '', undefined))],
    parameters,
    signal,
  });
}

function show(client, map) {
  const rows = [...map].sort(([a], [b]) => (a < b ? -1 : 1));
  return [
    rows.length > SHOWN && h('p', { class: 'quiet' }, `The first ${SHOWN} of ${count(rows.length)} channels.`),
    table('Retained messages', [
      { name: 'Channel', kind: 'mono', cell: ([channel]) => channel },
      { name: 'Payload', kind: 'value', cell: ([, { payload }]) => json(payload) },
      { name: 'Seq', kind: 'number', cell: ([, { seq }]) => count(seq) },
      { name: 'Changed', kind: 'time', cell: ([, { at }]) => ago(at) },
      { name: 'Sender', cell: ([, { sender }]) => sender ?? '' },
      {
        name: 'Actions',
        kind: 'actions',
        cell: ([channel, message]) => h('span', {},
          button('Edit …', () => edit(client, channel, message)), ' ',
          button('Remove', () => client.publish(channel, null, { retain: true, expect: message.seq }), { confirmation: `Remove the retained message of ${channel}?` })),
      },
    ], rows.slice(0, SHOWN), 'No channel has a retained message.'),
  ].filter(Boolean);
}

/** Open a dialog to change the retained message of a channel, or to make one. */
function edit(client, channel, message) {
  const close = () => dialog.remove();
  const dialog = h('dialog', { close, 'aria-label': 'Retained message' },
    h('h1', {}, message ? channel : 'New retained message'),
    form(async (values) => {
      await client.publish(message ? channel : values.channel, parseJson(values.payload), { retain: true, expect: message?.seq ?? 0 }).catch((error) => {
        if (error.code !== 'conflict') throw error;
        throw new Error(error.seq ? `Somebody else has changed it meanwhile: message ${error.seq} is newer. Close this and look at it.` : 'Somebody else has removed it meanwhile.');
      });
      dialog.close();
    },
    !message && field('Channel', { name: 'channel', required: true, placeholder: 'settings.theme' }, 'wide'),
    h('label', { class: 'wide' }, 'Payload (JSON)', h('textarea', { name: 'payload', required: true, spellcheck: 'false' }, message ? JSON.stringify(message.payload, null, 2) : '')),
    h('button', { class: 'main' }, 'Publish'),
    h('button', { type: 'button', click: () => dialog.close() }, 'Cancel')));
  document.body.append(dialog);
  dialog.showModal();
}
