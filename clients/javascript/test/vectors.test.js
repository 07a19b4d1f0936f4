import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';

import { Splitter, expiryOf } from '../src/catbus.js';

const read = (name) => JSON.parse(readFileSync(new URL(`../../../protocol/vectors/${name}.json`, import.meta.url), 'utf8'));

for (const { name, text, objects, error } of read('framing').cases) {
  test(`framing: ${name}`, () => {
    for (let cut = 0; cut <= text.length; cut++) {
      const splitter = new Splitter();
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

test('tokens: when they expire', () => {
  for (const { token, valid, expires } of read('tokens').cases) {
    if (valid) assert.equal(expiryOf(token), expires === null ? undefined : expires * 1000);
  }
});
