import { test } from 'node:test';

import fc from 'fast-check';

import * as modules from '../src/catbus/core.js';
import { life, live } from '../model/steps.js';

/** A longer run: `node model/long.js --minutes 60`. */
test('lives of a client, against a model', () => {
  fc.assert(fc.property(life, (steps) => live(modules, steps)), { numRuns: 500, seed: 20 });
});
