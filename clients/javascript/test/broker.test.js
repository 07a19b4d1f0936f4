import assert from 'node:assert/strict';
import { test } from 'node:test';

import { CatbusClient, DisconnectedError, RefusedError } from '../src/catbus.js';
import { channel, makeClient, next, openProxy, sign, skip } from './helpers.js';

test('published message is received', { skip }, async () => {
  const client = makeClient();
  const states = [];
  client.onStateChange((state) => states.push(state));
  await client.connect();
  assert.deepEqual(states, ['connecting', 'authenticating', 'connected']);
  assert.deepEqual([client.connectionState, client.id, client.transport], ['connected', 'node', 'websocket']);
  const place = channel();
  const heard = [];
  const subscription = await client.subscribe(`${place}.*`, (message) => heard.push(message));
  const { seq } = await client.publish(`${place}.a`, { text: 'ä🐱', n: 1 });
  await client.ping();
  const [{ at, ...message }] = heard;
  assert.deepEqual(message, { channel: `${place}.a`, payload: { text: 'ä🐱', n: 1 }, pattern: `${place}.*`, seq, sender: 'node', cursor: `${seq}.${subscription.epoch}` });
  assert.ok(Math.abs(at - Date.now()) < 60_000);
  assert.equal(subscription.cursor, seq);
  assert.ok((await client.ping()) < 5000);
  const { messages, more } = await client.history(`${place}.*`, { limit: 5 });
  assert.deepEqual([messages.map((each) => each.seq), more], [[seq], false]);
  await subscription.unsubscribe();
  await client.publish(`${place}.a`, 2);
  await client.ping();
  assert.equal(heard.length, 1);
  await client.disconnect();
  assert.deepEqual([client.connectionState, client.transport, client.id], ['disconnected', null, null]);
});

test('invalid token ends the client', { skip }, async () => {
  const client = makeClient({ token: 'sub-x.y' });
  await assert.rejects(client.connect(), (error) => error instanceof RefusedError && error.code === 'unauthenticated');
  assert.equal(client.connectionState, 'disconnected');
});

test('rejected request has an error code', { skip }, async () => {
  const client = makeClient({ token: sign({ grants: [{ grant_type: 'read', pattern: 'open.*' }] }) });
  await client.connect();
  await assert.rejects(client.publish('open.a', 1), { name: 'RefusedError', code: 'unauthorized' });
  await assert.rejects(client.subscribe('closed', () => {}), { name: 'RefusedError', code: 'unauthorized' });
  await assert.rejects(client.subscribe('a..b', () => {}), { name: 'RefusedError', code: 'invalid_pattern' });
  await assert.rejects(client.history('closed'), { name: 'RefusedError', code: 'unauthorized' });
  await assert.rejects(client.publish('open.a', 'x'.repeat(70_000)), { name: 'RefusedError', code: 'too_large' });
  await assert.rejects(client.publish('open.a', undefined), TypeError);
  // A rejected pattern can be subscribed again, also by several handlers.
  await client.subscribe('open.*', () => {});
  await client.subscribe('open.*', () => {});
  assert.equal(client.connectionState, 'connected');
});

test('invalid URL throws a TypeError', () => {
  for (const url of ['http://x', 'catbus', 'ftp://x']) assert.throws(() => new CatbusClient({ url, token: '' }), TypeError);
  assert.throws(() => new CatbusClient({ url: 'https://x', fallbackUrl: 'https://y', token: '' }), TypeError);
});

test('client retries an unreachable broker unless autoReconnect is false', { skip }, async () => {
  const proxy = await openProxy();
  proxy.refusing = true;
  const impatient = makeClient({ url: proxy.url, autoReconnect: false });
  await assert.rejects(impatient.connect(), DisconnectedError);
  const client = makeClient({ url: proxy.url });
  const connected = client.connect();
  await next(client, 'error');
  await next(client, 'error');
  proxy.refusing = false;
  await connected;
});

test('subscription with since receives every later message', { skip }, async () => {
  const client = makeClient();
  await client.connect();
  const place = channel();
  const seqs = [];
  for (let n = 0; n < 10; n++) seqs.push((await client.publish(place, n)).seq);
  const heard = [];
  await client.subscribe(place, (message) => heard.push(message.payload), { since: seqs[3] });
  await client.publish(place, 10);
  while (heard.length < 7) await client.ping();
  assert.deepEqual(heard, [4, 5, 6, 7, 8, 9, 10]);
});

test('slow iteration receives every message', { skip }, async () => {
  const client = makeClient();
  await client.connect();
  const place = channel();
  const { seq } = await client.publish(place, 'before');
  const publishing = (async () => {
    for (let n = 0; n < 300; n++) await client.publish(place, n);
  })();
  const heard = [];
  for await (const message of client.messages(place, { since: seq, buffer: 7 })) {
    heard.push(message.payload);
    if (heard.length % 10 === 0) await new Promise((resolve) => setTimeout(resolve, 2));
    if (heard.length === 300) break;
  }
  await publishing;
  assert.deepEqual(heard, Array.from({ length: 300 }, (_, n) => n));
  // Leaving the loop has ended the subscription.
  await client.subscribe(place, () => {});
});

test('lost connections lose or repeat no message in either direction', { skip }, async () => {
  const proxy = await openProxy();
  const client = makeClient({ url: proxy.url, maxQueueSize: 1000 });
  const witness = makeClient();
  await Promise.all([client.connect(), witness.connect()]);
  const place = channel();
  const heard = [];
  const seen = [];
  await client.subscribe(`${place}.*`, (message) => heard.push(message));
  await witness.subscribe(`${place}.*`, (message) => seen.push(message));
  const answers = [];
  for (let n = 0; n < 400; n++) {
    answers.push(client.publish(`${place}.mine`, n), witness.publish(`${place}.theirs`, n));
    if (n % 50 === 25) proxy.cut();
    if (n % 5 === 0) await new Promise((resolve) => setTimeout(resolve, 3));
  }
  const seqs = (await Promise.all(answers)).map(({ seq }) => seq);
  while (heard.length < 800 || seen.length < 800) await new Promise((resolve) => setTimeout(resolve, 5));
  assert.ok(proxy.accepted > 4);
  for (const messages of [heard, seen]) {
    assert.deepEqual(messages.map(({ seq }) => seq), seqs.toSorted?.((a, b) => a - b) ?? [...seqs].sort((a, b) => a - b));
    for (const channel of ['mine', 'theirs']) {
      const own = messages.filter((message) => message.channel.endsWith(channel)).map(({ payload }) => payload);
      assert.deepEqual(own, Array.from({ length: 400 }, (_, n) => n));
    }
  }
});

test('publishes without a connection wait up to maxQueueSize', { skip }, async () => {
  const proxy = await openProxy();
  const client = makeClient({ url: proxy.url, maxQueueSize: 3 });
  await assert.rejects(client.publish('a', 1), DisconnectedError);
  await client.connect();
  proxy.refusing = true;
  proxy.cut();
  await next(client, 'state', (state) => state === 'reconnecting');
  const place = channel();
  const waiting = [1, 2, 3].map((n) => client.publish(place, n));
  await assert.rejects(client.publish(place, 4), { code: 'overloaded' });
  await assert.rejects(client.publish(place, 4, { ephemeral: true }), DisconnectedError);
  proxy.refusing = false;
  const seqs = (await Promise.all(waiting)).map(({ seq }) => seq);
  assert.deepEqual(seqs, [...seqs].sort((a, b) => a - b));
});

test('token is renewed without a reconnect', { skip }, async () => {
  let asked = 0;
  const token = () => sign({ exp: Date.now() / 1000 + (asked++ ? 3600 : 2) });
  const client = makeClient({ token });
  const states = [];
  await client.connect();
  client.onStateChange((state) => states.push(state));
  while (asked < 2) await new Promise((resolve) => setTimeout(resolve, 20));
  await client.publish(channel(), 1);
  assert.deepEqual(states, []);
});

test('ephemeral message bypasses the log, and echo can be disabled', { skip }, async () => {
  const [one, other] = [makeClient(), makeClient()];
  await Promise.all([one.connect(), other.connect()]);
  const place = channel();
  const mine = [];
  const theirs = [];
  await one.subscribe(place, (message) => mine.push(message.payload));
  await other.subscribe(place, (message) => theirs.push(message.payload));
  assert.deepEqual(await one.publish(place, 1, { ephemeral: true }), {});
  await one.publish(place, 2, { echo: false });
  await one.publish(place, 3);
  while (!theirs.includes(3) || !mine.includes(3)) await other.ping();
  assert.deepEqual([mine, theirs], [[1, 3], [1, 2, 3]]);
});

test('subscriptions resume at their cursors after disconnect and connect', { skip }, async () => {
  const [client, other] = [makeClient(), makeClient()];
  await Promise.all([client.connect(), other.connect()]);
  const place = channel();
  const heard = [];
  await client.subscribe(place, (message) => heard.push(message.payload));
  await other.publish(place, 1);
  await client.disconnect();
  await other.publish(place, 2);
  await client.connect();
  await other.publish(place, 3);
  while (heard.length < 3) await other.ping();
  assert.deepEqual(heard, [1, 2, 3]);
});

test('error in a handler affects no other handler', { skip }, async (context) => {
  const told = context.mock.method(console, 'error', () => {});
  const client = makeClient();
  await client.connect();
  const place = channel();
  const heard = [];
  await client.subscribe(place, ({ payload }) => {
    heard.push(payload);
    throw new Error('mine');
  });
  await client.publish(place, 1);
  await client.publish(place, 2);
  while (heard.length < 2) await client.ping();
  assert.equal(told.mock.callCount(), 2);
});

test('gap is reported before the messages after it', { skip }, async () => {
  const client = makeClient();
  await client.connect();
  const place = channel();
  const { seq } = await client.publish(place, 1);
  const told = [];
  client.on('gap', (gap) => told.push(gap));
  await client.subscribe(place, ({ payload }) => told.push(payload), {
    since: seq + 5,
    epoch: 'of another log',
    onGap: (gap) => told.push(gap.reason),
  });
  while (told.length < 3) await client.ping();
  const [reason, gap, payload] = told;
  assert.deepEqual([reason, gap.pattern, gap.to, payload], ['epoch', place, 0, 1]);
});

test('revoked permission ends only the subscriptions that need it', { skip }, async () => {
  const [kept, lost] = [channel(), channel()];
  const grants = (...patterns) => patterns.map((pattern) => ({ grant_type: 'all', pattern }));
  let asked = 0;
  const token = () =>
    asked++ ? sign({ grants: grants(kept) }) : sign({ grants: grants(kept, lost), exp: Date.now() / 1000 + 2 });
  const client = makeClient({ token });
  await client.connect();
  const heard = [];
  await client.subscribe(kept, ({ payload }) => heard.push(payload));
  const revoked = next(client, 'revoked');
  await assert.rejects(async () => {
    for await (const _ of client.messages(lost)) assert.fail('nothing was published');
  }, { name: 'RefusedError', code: 'revoked' });
  assert.equal((await revoked).pattern, lost);
  await client.publish(kept, 1);
  await client.ping();
  assert.deepEqual(heard, [1]);
  await assert.rejects(client.publish(lost, 1), { code: 'unauthorized' });
});

test('client closes the connection of a silent broker', { skip }, async () => {
  const proxy = await openProxy();
  const client = makeClient({ url: proxy.url, pingInterval: 50, pingTimeout: 100 });
  await client.connect();
  proxy.pause();
  await next(client, 'state', (state) => state === 'reconnecting');
  await next(client, 'state', (state) => state === 'connected');
});

test('disconnect during connect causes no other error', { skip }, async () => {
  const proxy = await openProxy();
  proxy.refusing = true;
  const client = makeClient({ url: proxy.url });
  const connected = client.connect();
  await next(client, 'error');
  await client.disconnect();
  await assert.rejects(connected, DisconnectedError);
  proxy.refusing = false;
  await client.connect();
  assert.equal(client.connectionState, 'connected');
});

test('client rejects requests that the broker could not attribute', { skip }, async () => {
  const client = makeClient();
  await client.connect();
  const name = channel();
  const deep = (levels) => JSON.parse('['.repeat(levels) + ']'.repeat(levels));
  for (const payload of ['\ud800', { '\udfff': 1 }, ['\\\ud83d'], deep(64), { text: '['.repeat(64), deep: deep(63) }]) {
    for (const ephemeral of [false, true]) {
      await assert.rejects(client.publish(name, payload, { ephemeral }), { name: 'RefusedError', code: 'bad_message' });
    }
  }
  await assert.rejects(client.publish('\ud800', 1), { code: 'bad_message' });
  for (const options of [{ limit: 0 }, { limit: 1.5 }, { limit: '1' }, { before: -1 }, { before: NaN }]) {
    await assert.rejects(client.history(name, options), TypeError);
  }
  for (const payload of ['\\ud800', '🐱', '\\\\ud800', deep(63), '['.repeat(100), Array(100).fill([])]) await client.publish(name, payload);
  assert.deepEqual((await client.history(name)).messages.at(-3).payload, deep(63));
});
