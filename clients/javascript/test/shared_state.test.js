/** Retained messages and presence with a real broker. */

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { channel, makeClient, next, openProxy, sign, skip } from './helpers.js';

async function connected(options) {
  const client = makeClient(options);
  await client.connect();
  return client;
}

async function until(condition) {
  while (!condition()) await new Promise((resolve) => setTimeout(resolve, 2));
}

const shown = (map) => Object.fromEntries([...map].sort().map(([name, { payload }]) => [name, payload]));

test('map follows retained messages through lost connections', { skip }, async () => {
  const proxy = await openProxy();
  const [client, other] = [await connected({ url: proxy.url }), await connected()];
  const place = channel();
  await other.publish(`${place}.a`, 1, { retain: true });
  await other.publish(`${place}.b`, 'not retained');
  const heard = [];
  await client.subscribe(`${place}.*`, ({ payload, retain }) => heard.push([payload, retain]));
  const map = await client.retained(`${place}.*`);
  assert.deepEqual(shown(map), { [`${place}.a`]: 1 });
  const changes = [];
  map.onChange(({ message, previous }) => changes.push([message?.payload, previous?.payload]));
  const expected = [];
  for (let n = 2; n < 40; n++) {
    await other.publish(`${place}.a`, n, { retain: true });
    expected.push([n, n - 1]);
    if (n % 10 === 0) proxy.cut();
  }
  await other.publish(`${place}.a`, null, { retain: true });
  await until(() => changes.length >= 39);
  assert.deepEqual(changes, [...expected, [undefined, 39]]);
  assert.equal(map.size, 0);
  await until(() => heard.length >= 39);
  assert.deepEqual(heard, [...expected.map(([n]) => [n, true]), [null, true]]);
  assert.ok(proxy.accepted > 1);
});

test('of several clients that increment a counter by expect none loses an increment', { skip }, async () => {
  const place = channel();
  const proxy = await openProxy();
  const clients = await Promise.all(Array.from({ length: 4 }, () => connected({ url: proxy.url })));
  const increment = async (client) => {
    const map = await client.retained(place);
    let counted = 0;
    let { seq, payload } = map.get(place) ?? { seq: 0, payload: 0 };
    while (counted < 10) {
      try {
        const next = payload + 1;
        ({ seq } = await client.publish(place, next, { retain: true, expect: seq }));
        payload = next;
        counted++;
      } catch (error) {
        assert.equal(error.code, 'conflict');
        assert.ok(error.seq > seq);
        await until(() => map.get(place)?.seq >= error.seq);
        ({ seq, payload } = map.get(place));
      }
    }
  };
  await Promise.all(clients.map(increment));
  const [map] = await Promise.all([clients[0].retained(place), proxy.cut()]);
  await until(() => map.get(place).payload === 40);
});

test('wrong conditions are rejected', { skip }, async () => {
  const client = await connected();
  const place = channel();
  await assert.rejects(client.publish(place, 1, { expect: 0 }), { code: 'bad_message' });
  await assert.rejects(client.publish(place, 1, { retain: true, ephemeral: true }), { code: 'bad_message' });
  await assert.rejects(client.publish(place, 1, { retain: true, expect: 1 }), (error) => error.code === 'conflict' && error.seq === 0);
  const limited = await connected({ token: sign({ grants: [{ grant_type: 'write', pattern: '*' }] }) });
  await assert.rejects(limited.retained(place), { code: 'unauthorized' });
  await assert.rejects(limited.join(place).ready, { code: 'unauthorized' });
});

test('members see each other, also after a lost connection', { skip }, async () => {
  const proxy = await openProxy();
  const as = (clientId, more) => connected({ token: sign({ clientId }), ...more });
  const [alice, bob] = [await as('alice', { url: proxy.url }), await as('bob')];
  const room = channel();
  const people = await alice.presence(room);
  assert.equal(people.size, 0);
  const changes = [];
  people.onChange(({ action, member }) => changes.push([action, member.clientId, member.info]));
  const mine = await alice.join(room, { name: 'Alice' });
  const his = await bob.join(room, { name: 'Bob' });
  await until(() => people.get(room)?.length === 2);
  const page = await bob.members(room, { limit: 1 });
  assert.deepEqual(page.members, [{ channel: room, clientId: 'alice', session: undefined, sessions: 1, info: { name: 'Alice' } }]);
  const rest = await bob.members(room, { after: page.next });
  assert.deepEqual([rest.members.map(({ clientId }) => clientId), rest.next], [['bob'], undefined]);
  proxy.cut();
  await next(alice, 'state', (state) => state === 'connected');
  await his.update({ name: 'Robert' });
  await until(() => changes.some(([action, , info]) => action === 'update' && info.name === 'Robert'));
  await assert.rejects(his.update('x'.repeat(2000)), { code: 'too_large' });
  await his.leave();
  await until(() => changes.some(([action]) => action === 'leave'));
  // A reconnection within the grace is no leave.
  assert.deepEqual(changes.filter(([action]) => action !== 'update').map(([action, clientId]) => [action, clientId]), [['join', 'alice'], ['join', 'bob'], ['leave', 'bob']]);
  assert.deepEqual(people.get(room).map(({ clientId, info }) => [clientId, info]), [['alice', { name: 'Alice' }]]);
  await mine.leave();
  await until(() => people.size === 0);
});
