/**
 * Run the model for a time: `node model/long.js --minutes 60 --seed 1`. A failure is printed after shrinking, and its
 * seed reproduces it.
 */

import { parseArgs } from 'node:util';

import fc from 'fast-check';

import { loadModules } from './modules.js';
import { life, live } from './steps.js';

const modules = await loadModules();

const { values } = parseArgs({ options: { minutes: { type: 'string', default: '1' }, seed: { type: 'string', default: `${Date.now() % 1e9}` } } });
const until = performance.now() + Number(values.minutes) * 60_000;
let episodes = 0;
let seed = Number(values.seed);
console.log(`from the seed ${seed}, for ${values.minutes} minutes`);
for (; performance.now() < until; seed++) {
  const found = fc.check(fc.property(life, (steps) => live(modules, steps)), { numRuns: 1000, seed });
  episodes += found.numRuns;
  if (found.failed) {
    console.log(`found with the seed ${seed}:\n${JSON.stringify(found.counterexample, undefined, 1)}\n${found.errorInstance?.stack}`);
    process.exit(1);
  }
}
console.log(`${episodes} episodes, up to the seed ${seed - 1}: nothing found`);
