/** Keepalive of a connection, on the clock of the model. */

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { loadModules } from '../model/modules.js';
import { World } from '../model/world.js';

const modules = await loadModules();

/** A client that is connected, and the broker's end. */
function connected() {
  const world = new World(modules);
  world.settle();
  const [[connection, replica]] = world.alive;
  return { world, connection, replica };
}

test('connection is closed 2.5 seconds after a network change if no reply comes', () => {
  const { world, replica } = connected();
  replica.silent = true;
  world.wait(5000);
  world.do((core) => core.wake());
  world.wait(2499);
  // Another event does not extend the deadline.
  world.do((core) => core.wake());
  assert.equal(world.core.state, 'connected');
  world.wait(1);
  assert.equal(world.core.state, 'reconnecting');
});

test('connection that replies stays open after network events', () => {
  const { world } = connected();
  world.do((core) => core.wake());
  world.run(5000);
  assert.deepEqual([world.core.state, world.opened], ['connected', 1]);
});

test('page that was frozen sends a ping before it closes its connection', () => {
  const { world, connection, replica } = connected();
  world.wait(30_000); // A ping is due and sent.
  replica.work(Infinity);
  world.wait(600_000); // The page was frozen: the reply has arrived, but the page has not read it.
  assert.equal(world.core.state, 'connected');
  world.bring(connection, Infinity);
  world.turn();
  world.wait(2500);
  assert.deepEqual([world.core.state, world.opened], ['connected', 1]);
});

test('visible page reconnects after at most one second', () => {
  const { world, connection } = connected();
  world.lose(connection, 1006);
  for (const seconds of [0, 1, 2]) {
    world.wait(1000 * 2 ** seconds);
    world.failConnection(0);
  }
  const { opened } = world;
  world.do((core) => core.wake());
  assert.equal(world.opened, opened);
  world.wait(1000);
  world.do((core) => core.wake());
  assert.equal(world.opened, opened + 1);
});

test('clock that is 10 minutes fast causes few token requests', () => {
  const { world } = connected();
  world.wall += 600_000;
  const { tokensAsked } = world;
  world.run(600_000);
  assert.ok(world.tokensAsked - tokensAsked < 20, `${world.tokensAsked - tokensAsked}`);
});
