// Who is in the channels of a pattern, live.

import { h, table, title } from '../elements.js';
import { count, json } from '../format.js';
import { liveMapView } from '../live_map_view.js';

export function presenceView(place, { client, parameters, signal }) {
  liveMapView(place, {
    name: 'presence',
    heading: title('Presence', 'The members of channels on all replicas. With ', h('code', {}, '[presence] sessions = true'), ' every session is a member of ', h('code', {}, '_catbus.sessions'), '.'),
    open: (pattern, options) => client.presence(pattern, options),
    show: (people) => show([...people].flatMap(([, members]) => members)),
    parameters,
    signal,
  });
}

const show = (members) => table('Members', [
  { name: 'Channel', kind: 'mono', cell: ({ channel }) => channel },
  { name: 'Member', cell: ({ clientId, session }) => clientId ?? h('span', { class: 'quiet' }, session) },
  { name: 'Sessions', kind: 'number', cell: ({ sessions }) => count(sessions) },
  { name: 'Info', kind: 'value', cell: ({ info }) => (info === undefined ? '' : json(info)) },
], members, 'Nobody has joined a channel.');
