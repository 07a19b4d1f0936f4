import { test } from 'node:test';

import fc from 'fast-check';

import { loadModules } from '../model/modules.js';
import { life, live } from '../model/steps.js';

const modules = await loadModules();

/** A longer run: `node model/long.js --minutes 60`. */
test('client agrees with the model in random sequences of steps', () => {
  fc.assert(fc.property(life, (steps) => live(modules, steps)), { numRuns: 500, seed: 20 });
});

test('handler with a cursor of a newer epoch than requested loses no message', () => {
  const steps = [
    { step: 'subscribe', pattern: 'a.*', start: {} },
    { step: 'run', ms: 1000 },
    { step: 'others', channel: 'a.x' },
    { step: 'restore', back: 0 },
    { step: 'bring', number: 0, size: 76 },
    { step: 'subscribe', pattern: 'a.*', start: { since: 3 } },
  ];
  live(modules, { connected: true, steps });
});

test('handler without a cursor does not begin on a subscription from another epoch', () => {
  const steps = [
    { step: 'publish', channel: 'a.x', count: 1 },
    { step: 'workLate', number: 0, count: 1 },
    { step: 'bring', number: 0, size: 51 },
    { step: 'subscribe', pattern: 'a.*', start: {} },
    { step: 'subscribe', pattern: 'a.*', start: { since: 3 } },
    { step: 'restore', back: 0 },
  ];
  live(modules, { connected: true, steps });
});

test('a subscription that a newer request was to replace ends with its last handler', () => {
  const steps = [
    { step: 'subscribe', pattern: '*', start: {} },
    { step: 'work', number: 0, count: 1 },
    { step: 'refuse', number: 0, refusing: true },
    { step: 'subscribe', pattern: '*', start: { since: 0 } },
    { step: 'work', number: 0, count: 1 },
    { step: 'bring', number: 0, size: 152 },
    { step: 'unsubscribe', number: 0 },
    { step: 'unsubscribe', number: 0 },
  ];
  live(modules, { connected: true, steps });
});

test('a cursor above the head keeps no message from a handler that begins after it', () => {
  const steps = [
    { step: 'subscribe', pattern: '*', start: {} },
    { step: 'subscribe', pattern: '*', start: { since: 3 } },
    { step: 'run', ms: 1000 },
    { step: 'unsubscribe', number: 0 },
    { step: 'subscribe', pattern: '*', start: { since: 3 } },
    { step: 'subscribe', pattern: '*', start: {} },
  ];
  live(modules, { connected: true, steps });
});
