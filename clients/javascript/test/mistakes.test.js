import assert from 'node:assert/strict';
import { test } from 'node:test';

import fc from 'fast-check';

import { MISTAKES, withMistake } from '../model/mistakes.js';
import { loadModules } from '../model/modules.js';
import { life, live } from '../model/steps.js';

for (const [mistake, [start, ...changes]] of Object.entries(MISTAKES)) {
  test(`the model finds: ${mistake}`, () =>
    withMistake(changes, (modules) => {
      if (typeof start !== 'number') return assert.throws(() => live(modules, { connected: true, steps: start }));
      const found = fc.check(fc.property(life, (steps) => live(modules, steps)), { numRuns: 3000, seed: start, endOnFailure: true });
      assert.ok(found.failed);
    }));
}

test('the model finds nothing in those steps without the mistake', async () => {
  const modules = await loadModules();
  for (const [steps] of Object.values(MISTAKES)) if (typeof steps !== 'number') live(modules, { connected: true, steps });
});
