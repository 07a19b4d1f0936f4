import assert from 'node:assert/strict';
import { test } from 'node:test';

import fc from 'fast-check';

import { MISTAKES, withMistake } from '../model/mistakes.js';
import { life, live } from '../model/steps.js';

for (const [mistake, [seed, ...changes]] of Object.entries(MISTAKES)) {
  test(`the model finds: ${mistake}`, () =>
    withMistake(changes, (modules) => {
      const found = fc.check(fc.property(life, (steps) => live(modules, steps)), { numRuns: 3000, seed, endOnFailure: true });
      assert.ok(found.failed);
    }));
}
