import assert from 'node:assert/strict';
import { test } from 'node:test';

import { Disconnected, Refused, expiryOf, race, untilRefresh } from '../src/catbus.js';

/** A way that is decided by the test. */
function way() {
  const made = { begun: false, signal: undefined };
  made.start = (signal) => {
    made.begun = true;
    made.signal = signal;
    return new Promise((resolve, reject) => Object.assign(made, { resolve, reject }));
  };
  return made;
}

const turn = () => new Promise((resolve) => setTimeout(resolve, 1));
const run = () => new AbortController();

test('the first way is tried alone, and what wins ends the others', async () => {
  const [one, other] = [way(), way()];
  const outcome = race([one.start, other.start], 5, run().signal);
  assert.deepEqual([one.begun, other.begun], [true, false]);
  while (!other.begun) await turn();
  other.resolve('other');
  assert.equal(await outcome, 'other');
  assert.equal(one.signal.aborted, true);
});

test('the next way does not wait for the head start when the first has failed', async () => {
  const [one, other] = [way(), way()];
  const outcome = race([one.start, other.start], 1e6, run().signal);
  one.reject(new Disconnected('no'));
  while (!other.begun) await turn();
  other.resolve(2);
  assert.equal(await outcome, 2);
});

test('when all have failed, the last error is told', async () => {
  const [one, other] = [way(), way()];
  const outcome = race([one.start, other.start], 0, run().signal);
  while (!other.begun) await turn();
  other.reject(new Disconnected('first'));
  one.reject(new Disconnected('last'));
  await assert.rejects(outcome, { message: 'last' });
});

test('a refusal counts for all', async () => {
  const [one, other] = [way(), way()];
  const outcome = race([one.start, other.start], 1e6, run().signal);
  one.reject(new Refused('unauthenticated', 'no'));
  await assert.rejects(outcome, { code: 'unauthenticated' });
  assert.equal(other.begun, false);
});

test('who gives up gives all of them up', async () => {
  const one = way();
  const controller = run();
  const outcome = race([one.start], 1, controller.signal);
  controller.abort(new Disconnected('enough'));
  await assert.rejects(outcome, { message: 'enough' });
  assert.equal(one.signal.aborted, true);
});

test('tokens say when they expire', () => {
  const text = (claims) => Buffer.from(JSON.stringify(claims)).toString('base64url');
  assert.equal(expiryOf(`sub-${text({ exp: 2e9, grants: {} })}.mac`), 2e12);
  assert.equal(expiryOf(`${text({ alg: 'HS256' })}.${text({ sub: 'ä', exp: 5 })}.mac`), 5000);
  for (const token of [`sub-${text({})}.mac`, 'role-AAECAwQFBgcICQoLDA0ODw', 'a secret', '', 'sub-%.x']) {
    assert.equal(expiryOf(token), undefined);
  }
});

test('a device whose clock is wrong asks for the next token neither too often nor too late', () => {
  const text = (claims) => Buffer.from(JSON.stringify(claims)).toString('base64url');
  const made = 2e9;
  const token = `sub-${text({ iat: made, exp: made + 300 })}.mac`;
  for (const offset of [-86_400, -600, -31, 0, 301, 600, 86_400]) {
    assert.equal(untilRefresh(token, (made + offset) * 1000), 270_000, `${offset} s`);
  }
  const without = `sub-${text({ exp: made })}.mac`;
  assert.equal(untilRefresh(without, made * 1000 - 10_000), 5000);
  assert.equal(untilRefresh(without, made * 1000), 1000);
  assert.equal(untilRefresh(without, (made + 600) * 1000), 30_000);
  assert.equal(untilRefresh('role-x', 0), undefined);
});
