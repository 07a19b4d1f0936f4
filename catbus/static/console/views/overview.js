// The broker at a glance: rates, latencies, the log, the database, replicas.

import { figure, h, table, title } from '../elements.js';
import { ago, bytes, count, duration, rate } from '../format.js';
import { parseMetrics, quantileBetween, rateBetween, total } from '../metrics.js';
import { plot } from '../plot.js';
import { poll } from '../polling.js';

const INTERVAL = 2000;
const LENGTH = 150; // points of a plot: five minutes

const PLOTS = [
  ['Messages', rate, { published: byRate('catbus_publishes_total'), delivered: byRate('catbus_deliveries_total') }],
  ['Publish to acknowledgement', duration, quantiles('catbus_publish_latency_seconds')],
  ['Commit to delivery', duration, quantiles('catbus_delivery_latency_seconds')],
  ['Sessions', count, { open: (_, after) => total(after, 'catbus_sessions') }],
];

function byRate(name) {
  return (before, after) => rateBetween(before, after, name);
}

function quantiles(name) {
  return {
    p50: (before, after) => quantileBetween(before, after, name, 0.5),
    p99: (before, after) => quantileBetween(before, after, name, 0.99),
  };
}

export function overviewView(place, { api, signal }) {
  const content = h('div', {});
  place.append(...title('Overview', 'Plots and figures of the replica that serves this page, and of the log that all replicas share.'), content);
  const history = PLOTS.map(([, , series]) => Object.keys(series).map((name) => ({ name, values: [] })));
  let before;

  poll(content, signal, INTERVAL, async () => {
    const [status, text] = await Promise.all([
      api('status', { signal }),
      fetch(new URL('metrics', document.baseURI), { signal, cache: 'no-store' }).then((response) => response.text()),
    ]);
    const scrape = parseMetrics(text);
    if (before) {
      PLOTS.forEach(([, , series], index) => Object.values(series).forEach((measure, line) => {
        const { values } = history[index][line];
        values.push(measure(before, scrape));
        if (values.length > LENGTH) values.shift();
      }));
    }
    before = scrape;
    return show(status, scrape, history);
  });
}

function show(status, scrape, history) {
  const { log } = status;
  const plots = PLOTS.map(([name, format], index) => plot(name, history[index], format, LENGTH));
  return [
    h('div', { class: 'figures' },
      figure(status.state, 'state', status.state === 'ready' ? 'good' : 'bad'),
      figure(count(total(scrape, 'catbus_sessions')), 'sessions'),
      figure(count(total(scrape, 'catbus_subscriptions')), `subscriptions, ${count(status.lagging)} lag`),
      figure(count(status.head), 'newest message (head)'),
      figure(bytes(total(scrape, 'process_resident_memory_bytes')), 'memory of the process')),
    h('div', { class: 'plots' }, plots),
    h('h2', {}, 'Log'),
    h('div', { class: 'figures' },
      figure(log.available === false ? 'unavailable' : 'available', log.server ?? 'in memory', log.available === false ? 'bad' : 'good'),
      figure(count(status.floor), 'oldest message (floor)'),
      figure(bytes(total(scrape, 'catbus_log_size_bytes')), 'size'),
      figure(count(total(scrape, 'catbus_retained_messages')), `retained, ${bytes(total(scrape, 'catbus_retained_bytes'))}`),
      figure(count(log.missing ?? 0), 'missing messages', log.missing ? 'bad' : ''),
      figure(count(log.retention?.held ?? 0), 'messages that retention has to keep')),
    h('h2', {}, 'Replicas'),
    table('Replicas', [
      { name: 'Name', cell: ({ name, pid }) => `${name}:${pid}` },
      { name: 'State', cell: ({ state }) => h('span', { class: state === 'ready' ? 'good' : 'bad' }, state) },
      { name: 'Sessions', kind: 'number', cell: ({ clients }) => count(clients) },
      { name: 'Applied', kind: 'number', cell: ({ applied }) => count(applied) },
      { name: 'Lagging', kind: 'number', cell: ({ lagging }) => count(lagging) },
      { name: 'Lag', kind: 'number', cell: ({ lag }) => count(lag) },
      { name: 'Version', cell: ({ version }) => version },
      { name: 'Started', kind: 'time', cell: ({ started }) => ago(started) },
      { name: 'Heartbeat', kind: 'time', cell: ({ silent }) => `${duration(silent)} ago` },
    ], log.replicas ?? [status]),
  ];
}
