// The parts of the console that need no browser.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { bytes, duration, json, rate } from '../../catbus/static/console/format.js';
import { parseMetrics, quantileBetween, rateBetween, total } from '../../catbus/static/console/metrics.js';
import { treeOf } from '../../catbus/static/console/views/channels.js';

const scrape = (at, published, [fast, slow, all]) => parseMetrics(`# HELP catbus_sessions Open sessions.
catbus_sessions{transport="websocket"} 2.0
catbus_sessions{transport="sse",note="a \\"quoted\\" one"} 3
catbus_publishes_total ${published}
delay_bucket{le="0.01"} ${fast}
delay_bucket{le="0.1"} ${slow}
delay_bucket{le="+Inf"} ${all}
`, at);

test('a scrape is parsed with its labels', () => {
  const parsed = scrape(0, 1, [0, 0, 0]);
  assert.equal(total(parsed, 'catbus_sessions'), 5);
  assert.equal(total(parsed, 'catbus_sessions', { transport: 'sse' }), 3);
  assert.equal(total(parsed, 'nothing'), 0);
});

test('a rate is the growth in a second, and a restart does not make it negative', () => {
  const none = [0, 0, 0];
  assert.equal(rateBetween(scrape(10, 100, none), scrape(12, 150, none), 'catbus_publishes_total'), 25);
  assert.equal(rateBetween(scrape(10, 100, none), scrape(12, 3, none), 'catbus_publishes_total'), 0);
});

test('a quantile is that of the time between two scrapes', () => {
  const before = scrape(0, 0, [1000, 1000, 1000]);
  const after = scrape(2, 0, [1050, 1100, 1100]);
  assert.equal(quantileBetween(before, after, 'delay', 0.25), 0.005);
  assert.equal(quantileBetween(before, after, 'delay', 0.5), 0.01);
  assert.equal(Number(quantileBetween(before, after, 'delay', 0.75).toFixed(4)), 0.055);
  assert.equal(quantileBetween(before, scrape(2, 0, [1000, 1000, 1010]), 'delay', 0.99), 0.1);
  assert.ok(Number.isNaN(quantileBetween(before, before, 'delay', 0.5)));
  assert.ok(Number.isNaN(quantileBetween(before, after, 'nothing', 0.5)));
});

test('channels are a tree with sums', () => {
  const root = treeOf([
    { channel: 'a.b.c', messages: 3, subscriptions: 1 },
    { channel: 'a.b', messages: 2, subscriptions: 0 },
    { channel: 'a.d', messages: 1, subscriptions: 2 },
  ]);
  const a = root.children.get('a');
  const b = a.children.get('b');
  assert.deepEqual([a.messages, a.isChannel, a.path], [6, undefined, 'a']);
  assert.deepEqual([b.messages, b.isChannel, b.subscriptions, b.path], [5, true, 0, 'a.b']);
  assert.equal(b.children.get('c').path, 'a.b.c');
});

test('values are short texts', () => {
  assert.deepEqual([rate(0.0312), rate(5), rate(12_345), rate(NaN)], ['0.031/s', '5/s', '12.3K/s', '–']);
  assert.deepEqual([bytes(0), bytes(1536), bytes(20 * 1024 ** 2), bytes(undefined)], ['0 B', '1.5 KiB', '20 MiB', '–']);
  assert.deepEqual([duration(0.0012), duration(0.5), duration(90), duration(7200)], ['1.2 ms', '500 ms', '2 min', '2 h']);
  assert.equal(json({ text: 'x'.repeat(500) }, 20), '{"text":"xxxxxxxxxxx …');
});
