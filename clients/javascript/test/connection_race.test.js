import assert from 'node:assert/strict';
import { test } from 'node:test';

import { ConnectionRace } from '../src/catbus/connection_race.js';
import { DisconnectedError, RefusedError } from '../src/catbus/errors.js';
import { Timers } from '../src/catbus/timers.js';
import { expiryOf, minRenewalDelay, renewalDelay } from '../src/catbus/token_renewal.js';

/** A dial with the given number of attempts, whose outcomes the test decides. */
function dial(ways, headStart) {
  const made = { timers: new Timers(), started: [], closed: [], outcome: undefined };
  const host = {
    timers: made.timers,
    open: (route) => (made.started.push(route), route),
    close: (connection) => made.closed.push(connection),
    won: (connection) => (made.outcome = connection),
    failed: (why) => (made.outcome = why),
  };
  const routes = Array.from({ length: ways }, (_, id) => ({ id, url: `way ${id}` }));
  made.dial = new ConnectionRace(1, routes, { headStart, connectTimeout: 1e5 }, host);
  made.routes = routes;
  made.dial.begin();
  return made;
}

test('first attempt has a head start, and the winner cancels the others', () => {
  const { timers, routes: [one, other], started, closed, dial: race, ...made } = dial(2, 300);
  timers.advance(299);
  assert.deepEqual(started, [one]);
  timers.advance(300);
  assert.deepEqual(started, [one, other]);
  race.won(other);
  assert.deepEqual([closed, timers.next], [[one], undefined]);
  assert.equal(made.outcome, undefined);
});

test('winner is reported once', () => {
  const made = dial(2, 0);
  made.timers.advance(10);
  made.dial.won(made.routes[1]);
  made.dial.failed(made.routes[0], new DisconnectedError('too late'));
  assert.equal(made.outcome, made.routes[1]);
});

test('next attempt starts at once when the first has failed', () => {
  const made = dial(2, 1e4);
  made.dial.failed(made.routes[0], new DisconnectedError('no'));
  assert.deepEqual(made.started, made.routes);
  made.dial.won(made.routes[1]);
  assert.equal(made.outcome, made.routes[1]);
});

test('last error is reported when all attempts have failed', () => {
  const made = dial(2, 0);
  made.timers.advance(10);
  made.dial.failed(made.routes[1], new DisconnectedError('first'));
  assert.equal(made.outcome, undefined);
  made.dial.failed(made.routes[0], new DisconnectedError('last'));
  assert.equal(made.outcome.message, 'last');
});

test('attempt without a reply fails', () => {
  const made = dial(1, 0);
  made.timers.advance(1e5);
  assert.deepEqual([made.outcome.name, made.closed], ['DisconnectedError', made.routes]);
});

test('rejection ends all attempts', () => {
  const made = dial(2, 1e4);
  made.dial.failed(made.routes[0], new RefusedError('unauthenticated', 'no'));
  assert.deepEqual([made.outcome.code, made.started.length, made.timers.next], ['unauthenticated', 1, undefined]);
});

test('cancelled dial cancels all its attempts', () => {
  const made = dial(1, 1);
  made.dial.abort();
  assert.deepEqual([made.closed, made.timers.next, made.outcome], [made.routes, undefined, undefined]);
});

test('expiry is read from a token', () => {
  const text = (claims) => Buffer.from(JSON.stringify(claims)).toString('base64url');
  assert.equal(expiryOf(`sub-${text({ exp: 2e9, grants: {} })}.mac`), 2e12);
  assert.equal(expiryOf(`${text({ alg: 'HS256' })}.${text({ sub: 'ä', exp: 5 })}.mac`), 5000);
  for (const token of [`sub-${text({})}.mac`, 'role-AAECAwQFBgcICQoLDA0ODw', 'a secret', '', 'sub-%.x']) {
    assert.equal(expiryOf(token), undefined);
  }
});

test('wrong clock causes no early or late token renewal', () => {
  const text = (claims) => Buffer.from(JSON.stringify(claims)).toString('base64url');
  const made = 2e9;
  const token = `sub-${text({ iat: made, exp: made + 300 })}.mac`;
  for (const offset of [-86_400, -600, -31, 0, 301, 600, 86_400]) {
    assert.equal(renewalDelay(token, (made + offset) * 1000), 270_000, `${offset} s`);
  }
  const without = `sub-${text({ exp: made })}.mac`;
  assert.equal(renewalDelay(without, made * 1000 - 10_000), 5000);
  assert.equal(renewalDelay(without, made * 1000), 1000);
  assert.equal(renewalDelay(without, (made + 600) * 1000), 30_000);
  assert.equal(renewalDelay('role-x', 0), undefined);
  assert.deepEqual([0, 1, 2, 5, 50].map(minRenewalDelay), [1000, 2000, 4000, 30_000, 30_000]);
});
