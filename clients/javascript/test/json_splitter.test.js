import assert from 'node:assert/strict';
import { test } from 'node:test';

import { JsonSplitter } from '../src/catbus/json_splitter.js';

const OBJECTS = [
  {},
  { type: 'message', payload: 'a { in } text, and "quotes" and \\ and \\" too' },
  { payload: [{ a: [{}, {}] }, '}{', '\n', '\\'] },
  { payload: '\\\\', text: 'ä🐱\u2028' },
  { deep: { deep: { deep: { deep: [] } } } },
];

/** Pseudorandom numbers, the same in every run. */
function* random(seed) {
  for (let state = seed; ; ) {
    state = (state * 1103515245 + 12345) % 2 ** 31;
    yield state / 2 ** 31;
  }
}

test('objects are complete for every split of the text', () => {
  const text = OBJECTS.map((object, index) => JSON.stringify(object) + ['', '\n', ' \r\n\t'][index % 3]).join('');
  for (let size = 1; size <= text.length; size++) {
    const splitter = new JsonSplitter();
    const found = [];
    for (let at = 0; at < text.length; at += size) splitter.feed(text.slice(at, at + size), (object) => found.push(object));
    assert.deepEqual(found, OBJECTS);
  }
  const chance = random(7);
  for (let round = 0; round < 300; round++) {
    const splitter = new JsonSplitter();
    const found = [];
    for (let at = 0; at < text.length; ) {
      const size = 1 + Math.floor(chance.next().value * 9);
      splitter.feed(text.slice(at, at + size), (object) => found.push(object));
      at += size;
    }
    assert.deepEqual(found, OBJECTS);
  }
});

test('newline does not end an object', () => {
  const found = [];
  new JsonSplitter().feed('{"payload":\n{"channel":"evil"}\n}\n', (object) => found.push(object));
  assert.deepEqual(found, [{ payload: { channel: 'evil' } }]);
});

test('text outside of an object is an error', () => {
  for (const text of ['x', '[1]', '1', '}', '{} ,']) {
    assert.throws(() => new JsonSplitter().feed(text, () => {}), { code: 'bad_message' });
  }
});

test('every character is scanned once', () => {
  const text = JSON.stringify({ payload: '{}'.repeat(100_000) });
  const splitter = new JsonSplitter();
  const began = process.cpuUsage().user;
  let found = 0;
  for (let at = 0; at < text.length; at += 5) splitter.feed(text.slice(at, at + 5), () => found++);
  assert.equal(found, 1);
  // A splitter that scans the whole text for each chunk takes minutes.
  assert.ok(process.cpuUsage().user - began < 20e6);
});
