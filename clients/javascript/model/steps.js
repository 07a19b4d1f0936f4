/** The steps of an episode, as data that fast-check generates, shrinks and prints. */

import fc from 'fast-check';

import { CHANNELS, PATTERNS, World } from './world.js';

const number = fc.nat(9);
const channel = fc.constantFrom(...CHANNELS);
const member = fc.constantFrom('carol', 'dave', 'alice');
const info = fc.constantFrom(1, 2, 'wrong');
/** Of a conditional publish: as it is, none, another one, or no condition. */
const expect = fc.constantFrom(0, null, 1, undefined);
const start = fc.oneof(
  { weight: 3, arbitrary: fc.constant({}) },
  { weight: 3, arbitrary: fc.record({ since: fc.nat(5) }) },
  { weight: 1, arbitrary: fc.record({ last: fc.integer({ min: 1, max: 5 }) }) },
);

/** Each step: its weight, its arguments, and its effect on the world. Without a target it does nothing. */
const STEPS = {
  publish: [6, { channel, count: fc.integer({ min: 1, max: 3 }) }, (world, { channel, count }) => {
    for (let n = 0; n < count; n++) world.publish(channel, false);
  }],
  publishRetained: [3, { channel, expect }, (world, { channel, expect }) => world.publish(channel, false, { retain: true, expect })],
  poison: [2, { channel }, (world, { channel }) => world.publish(channel, true)],
  others: [3, { channel }, ({ log }, { channel }) => void log.append(channel, 'of others')],
  othersRetained: [3, { channel, removed: fc.boolean() }, ({ log }, { channel, removed }) =>
    void log.append(channel, removed ? null : 'of others', undefined, { retain: true })],
  openMap: [3, { kind: fc.constantFrom('retained', 'presence'), pattern: fc.constantFrom(...PATTERNS) }, ({ maps }, { kind, pattern }) => maps.add(kind, pattern)],
  closeMap: [1.5, { number }, ({ maps }, { number }) => pick(maps.open, number, (map) => maps.close(map))],
  join: [2, { channel, info }, (world, { channel, info }) => world.join(channel, info)],
  updateMembership: [1, { number, info }, (world, { number, info }) =>
    pick(world.memberships.filter(({ over }) => !over), number, (membership) => world.updateMembership(membership, info))],
  leave: [1, { number }, (world, { number }) =>
    pick(world.memberships.filter(({ over }) => !over), number, (membership) => world.leave(membership))],
  othersJoin: [2, { channel, member, info: fc.nat(2) }, ({ presence }, { channel, member, info }) => presence.join(channel, member, 'elsewhere', info)],
  othersLeave: [2, { channel, member }, ({ presence }, { channel, member }) => presence.leave(channel, member, 'elsewhere')],
  full: [2, { number, full: fc.boolean() }, (world, { number, full }) => pick(world.alive, number, ([, replica]) => void (replica.full = full))],
  retain: [1, { count: fc.integer({ min: 1, max: 6 }) }, (world, { count }) => world.retain(count)],
  members: [0.5, { pattern: fc.constantFrom(...PATTERNS) }, (world, { pattern }) =>
    world.ask((core, settler) => core.members(pattern, undefined, undefined, settler))],
  subscribe: [4, { pattern: fc.constantFrom(...PATTERNS), start }, (world, { pattern, start }) =>
    world.subscribe(pattern, { ...start, ...(start.since !== undefined && { epoch: 'e1' }) })],
  unsubscribe: [2, { number }, (world, { number }) => pick(world.open, number, (subscriber) => world.unsubscribe(subscriber))],
  pause: [1, { number }, (world, { number }) =>
    pick(world.open, number, ({ subscriber }) => world.do((core) => core.subscriptions.pause(subscriber)))],
  unpause: [1, { number }, (world, { number }) =>
    pick(world.open, number, ({ subscriber }) => world.do((core) => core.subscriptions.unpause(subscriber)))],
  ping: [1, {}, (world) => world.ask((core, settler) => core.ping(settler))],
  history: [1, { pattern: fc.constantFrom(...PATTERNS) }, (world, { pattern }) =>
    world.ask((core, settler) => core.history(pattern, 3, undefined, settler))],
  connect: [1, {}, (world) => world.connect()],
  disconnect: [0.5, {}, (world) => world.disconnect()],
  become: [0.5, { clientId: fc.constantFrom('alice', 'bob') }, (world, { clientId }) => world.become(clientId)],
  open: [8, { number }, (world, { number }) => pick(world.opening, number, (_, index) => world.openConnection(index))],
  fail: [1, { number }, (world, { number }) => pick(world.opening, number, (_, index) => world.failConnection(index))],
  token: [8, { number }, (world, { number }) => pick(world.tokens, number, (_, index) => world.deliverToken(index))],
  noToken: [0.5, { number }, (world, { number }) => pick(world.tokens, number, (_, index) => world.noToken(index))],
  work: [10, { number, count: fc.integer({ min: 1, max: 5 }) }, (world, { number, count }) =>
    pick(world.alive, number, ([, replica]) => {
      replica.work(count);
      replica.deliver(replica.applied + count);
    })],
  bring: [12, { number, size: fc.integer({ min: 1, max: 600 }) }, (world, { number, size }) =>
    pick(world.alive, number, ([connection]) => world.bring(connection, size))],
  workLate: [1, { number, count: fc.integer({ min: 1, max: 5 }) }, (world, { number, count }) =>
    pick([...world.replicas.values()], number, (replica) => replica.work(count))],
  lose: [2, { number, code: fc.constantFrom(1006, 4504, 4508, 4401) }, (world, { number, code }) =>
    pick(world.alive, number, ([connection]) => world.lose(connection, code))],
  cut: [2, {}, (world) => {
    for (const [connection] of world.alive) world.lose(connection, 1006);
  }],
  busy: [1, { number }, (world, { number }) => pick(world.alive, number, ([, replica]) => void replica.busy++)],
  goaway: [3, { number }, (world, { number }) => pick(world.alive, number, ([connection]) => world.goaway(connection))],
  silence: [0.7, { number }, (world, { number }) =>
    pick(world.alive, number, ([, replica]) => {
      world.doubt();
      replica.silent = true;
    })],
  stop: [1, { number }, (world, { number }) => pick(world.alive, number, ([, replica]) => void (replica.stopping = true))],
  hang: [1, { number }, (world, { number }) => pick(world.alive, number, ([, replica]) => {
      world.doubt();
      replica.stuck = true;
    })],
  databaseResponds: [1, { number }, (world, { number }) => pick([...world.replicas.values()], number, (replica) => replica.databaseResponds())],
  giveUp: [1, { number }, (world, { number }) =>
    pick(world.alive, number, ([, replica]) => {
      world.doubt();
      replica.giveUp();
    })],
  refuse: [1, { number, refusing: fc.boolean() }, (world, { number, refusing }) =>
    pick(world.alive, number, ([, replica]) => void (replica.refusing = refusing))],
  older: [0.5, { number }, (world, { number }) => pick(world.alive, number, ([, replica]) => void (replica.old = true))],
  head: [1, { number }, (world, { number }) =>
    pick(world.alive, number, ([, replica]) => {
      if (replica.authenticated && ![...replica.held.values()].some(({ behind }) => behind)) replica.head();
    })],
  restore: [0.3, { back: fc.nat(3) }, (world, { back }) => world.restore(Math.max(0, world.log.head - back))],
  wake: [1, {}, (world) => world.do((core) => core.wake())],
  wait: [6, { ms: fc.oneof(fc.constantFrom(4, 500, 1000, 2500), fc.constantFrom(10_000, 60_000)) }, (world, { ms }) => world.wait(ms)],
  run: [1, { ms: fc.constantFrom(1000, 20_000) }, (world, { ms }) => world.run(ms)],
  clock: [0.5, { ms: fc.constantFrom(-3_600_000, -600_000, 600_000, 86_400_000) }, (world, { ms }) => void (world.wall += ms)],
};

function pick(list, number, act) {
  if (list.length) act(list[number % list.length], number % list.length);
}

const steps = fc.array(
  fc.oneof(...Object.entries(STEPS).map(([step, [weight, needs]]) => ({
    weight: weight * 10,
    arbitrary: fc.record({ step: fc.constant(step), ...needs }),
  }))),
  { maxLength: 70, size: 'max' },
);

/** An episode: a list of steps, most often of a connected client. */
export const life = fc.record({ connected: fc.oneof({ weight: 4, arbitrary: fc.constant(true) }, fc.constant(false)), steps });

/** Run an episode with the modules of a client. */
export function live(modules, { connected, steps }) {
  const world = new World(modules);
  if (connected) world.settle();
  for (const { step, ...needs } of steps) STEPS[step][2](world, needs);
  world.finish();
}
