import assert from 'node:assert/strict';
import { test } from 'node:test';

import { channel, makeClient, next, openProxy, sign, skip } from './helpers.js';

const numbers = (first, last) => Array.from({ length: last - first + 1 }, (_, n) => first + n);

async function connected(options) {
  const client = makeClient(options);
  await client.connect();
  return client;
}

async function until(condition) {
  while (!condition()) await new Promise((resolve) => setTimeout(resolve, 2));
}

test('subscription with last receives history and then new messages without a gap', { skip }, async () => {
  const client = await connected();
  const place = channel();
  for (const n of numbers(1, 20)) await client.publish(place, n);
  const publishing = (async () => {
    for (const n of numbers(21, 60)) await client.publish(place, n);
  })();
  const all = [5, 1, 1000].map((last) => {
    const heard = [];
    client.subscribe(place, ({ payload }) => heard.push(payload), { last });
    return heard;
  });
  await publishing;
  await until(() => all.every((heard) => heard.at(-1) === 60));
  for (const heard of all) assert.deepEqual(heard, numbers(heard[0], 60));
  assert.deepEqual(all.map((heard) => heard[0] <= 21), [true, true, true]);
  assert.equal(all[2][0], 1);
});

test('subscription resumes at a cursor of a message or a page', { skip }, async () => {
  const client = await connected();
  const place = channel();
  const empty = await client.history(place);
  assert.deepEqual([empty.messages, empty.more], [[], false]);
  const first = [];
  await client.subscribe(place, (message) => first.push(message));
  for (const n of numbers(1, 6)) await client.publish(place, n);
  await until(() => first.length === 6);
  const page = await client.history(place, { before: first[4].cursor, limit: 2 });
  assert.deepEqual(page.messages, first.slice(2, 4));
  for (const [since, expected] of [[first[1].cursor, [3, 4, 5, 6]], [page.cursor, [5, 6]], [empty.cursor, numbers(1, 6)]]) {
    const heard = [];
    const subscription = await client.subscribe(place, ({ payload }) => heard.push(payload), { since });
    await until(() => heard.length === expected.length);
    assert.deepEqual(heard, expected);
    assert.equal(subscription.position, first[5].cursor);
    await subscription.close();
  }
  const after = await client.history(place, { after: first[3].cursor });
  assert.deepEqual([after.messages.map(({ payload }) => payload), after.more], [[5, 6], false]);
  const part = await client.history(place, { after: first[0].cursor, limit: 2 });
  assert.deepEqual([part.messages.map(({ payload }) => payload), part.more], [[5, 6], true]);
});

test('persistent subscription resumes after a reload at the cursor of its handler', { skip }, async () => {
  const store = new Map();
  const storage = { getItem: (key) => store.get(key) ?? null, setItem: (key, value) => store.set(key, value) };
  const other = await connected();
  const place = channel();
  const heard = [];
  const visit = async (count, handler) => {
    const client = await connected({ storage });
    const subscription = await client.subscribe(place, handler, { persist: 'key' });
    await until(() => heard.length === count);
    await subscription.close();
    await client.disconnect();
  };
  const listening = visit(2, ({ payload }) => heard.push(payload));
  await until(() => store.size);
  for (const n of [1, 2]) await other.publish(place, n);
  await listening;
  for (const n of [3, 4]) await other.publish(place, n);
  await visit(4, async ({ payload }) => {
    await new Promise(setImmediate);
    heard.push(payload);
  });
  assert.deepEqual(heard, [1, 2, 3, 4]);
  assert.deepEqual([...store.keys()], ['catbus:key']);
  store.set('catbus:key', 'of somebody else');
  const client = await connected({ storage });
  await client.subscribe(place, () => {}, { persist: 'key' });
});

test('slow async handler delays no other handler and misses no message', { skip }, async () => {
  const client = await connected();
  const place = channel();
  const slow = [];
  const fast = [];
  await client.subscribe(place, ({ payload }) => fast.push(payload));
  let go;
  const gate = new Promise((resolve) => (go = resolve));
  await client.subscribe(place, async ({ payload }) => {
    await gate;
    slow.push(payload);
  });
  await Promise.all(numbers(1, 2500).map((n) => client.publish(place, n)));
  await until(() => fast.length === 2500);
  go();
  await until(() => slow.length === 2500);
  assert.deepEqual([slow, fast], [numbers(1, 2500), numbers(1, 2500)]);
});

test('abort signal ends a subscription', { skip }, async () => {
  const client = await connected();
  const place = channel();
  const controller = new AbortController();
  const heard = [];
  const { signal } = controller;
  await client.subscribe(place, ({ payload }) => heard.push(payload), { signal, onEnd: () => assert.fail('it was wanted') });
  await client.publish(place, 1);
  await until(() => heard.length);
  controller.abort(new Error('enough'));
  await client.publish(place, 2);
  await client.ping();
  assert.deepEqual(heard, [1]);
  await assert.rejects(client.subscribe(place, () => {}, { signal }), { message: 'enough' });
  await assert.rejects(async () => {
    for await (const _ of client.messages(place, { signal })) assert.fail('nothing is to come');
  }, { message: 'enough' });
});

test('subscription reports when it is live and when it has ended', { skip }, async () => {
  const [kept, lost] = [channel(), channel()];
  const grants = (...patterns) => patterns.map((pattern) => ({ grant_type: 'all', pattern }));
  let asked = 0;
  const token = () =>
    asked++ ? sign({ grants: grants(kept) }) : sign({ grants: grants(kept, lost), exp: Date.now() / 1000 + 2 });
  const proxy = await openProxy();
  const client = await connected({ url: proxy.url, token });
  const told = [];
  const note = (name) => ({ onLive: () => told.push(`${name} is live`), onEnd: ({ code }) => told.push(`${name}: ${code}`) });
  await client.publish(kept, 1);
  await client.subscribe(kept, () => told.push('a message'), { last: 1, ...note('kept') });
  await client.subscribe(lost, () => {}, note('lost'));
  await until(() => told.length === 4);
  assert.deepEqual(told, ['a message', 'kept is live', 'lost is live', 'lost: revoked']);
  proxy.cut();
  await next(client, 'state', (state) => state === 'connected');
  await until(() => told.length === 5);
  assert.equal(told[4], 'kept is live');
});
