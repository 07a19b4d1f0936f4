import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';

import { JsonSplitter } from '../src/catbus/json_splitter.js';
import { expiryOf } from '../src/catbus/token_renewal.js';

const read = (name) => JSON.parse(readFileSync(new URL(`../../../protocol/vectors/${name}.json`, import.meta.url), 'utf8'));

for (const { name, text, objects, error } of read('framing').cases) {
  test(`framing: ${name}`, () => {
    for (let cut = 0; cut <= text.length; cut++) {
      const splitter = new JsonSplitter();
      const found = [];
      let code;
      try {
        for (const piece of [text.slice(0, cut), text.slice(cut)]) splitter.feed(piece, (object) => found.push(object));
      } catch (raised) {
        code = raised.code;
      }
      assert.deepEqual([found, code], [objects, error]);
    }
  });
}

test('tokens: expiry', () => {
  for (const { token, valid, expires } of read('tokens').cases) {
    if (valid) assert.equal(expiryOf(token), expires === null ? undefined : expires * 1000);
  }
});

/** Payloads that a receiver must accept, and payloads that no sender may send. */
for (const { name, json, valid, double } of read('payloads').cases) {
  test(`payloads: ${name}`, () => {
    const found = [];
    try {
      new JsonSplitter().feed(`{"payload":${json}}`, ({ payload }) => found.push(payload));
    } catch (error) {
      assert.ok(!valid, `${error}`);
    }
    if (!valid) return assert.ok(LENIENT.test(name) || !found.length);
    assert.equal(found.length, 1);
    if (double !== undefined) assert.equal(found[0], Number(double));
  });
}

/** JavaScript parses unpaired surrogates and any depth of nesting. The client sends neither. */
const LENIENT = /half|halves|levels/;
