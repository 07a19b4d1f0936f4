/** Regressions, each with a scripted broker. `CATBUS_CLIENT=file:///... node --test` tests another client. */

import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { test } from 'node:test';

import { GOAWAY, client as module, fakeClock, message, outcome, scripted, until } from './scripted.js';

const { RefusedError = module.Refused, DisconnectedError = module.Disconnected } = module;

// A late reply on a connection that another one has replaced

const LATE = ['subscribed', 'published', 'unsubscribed', 'error'];

/** A client on A with one unanswered request of each kind, and the reply of A to one of them. */
async function unanswered(kind) {
  const made = scripted();
  const { client } = made;
  const heard = [];
  const A = await made.connected();
  const gone = client.subscribe('gone', () => assert.fail('it was left'));
  A.say({ type: 'subscribed', pattern: 'gone', seq: 10, epoch: 'e1', id: (await A.next('subscribe')).id });
  const leaving = (await gone).unsubscribe();
  const unsubscribe = await A.next('unsubscribe');
  const published = client.publish('late', 1);
  const publish = await A.next('publish');
  const subscribing = client.subscribe('late', ({ seq }) => heard.push(seq));
  const subscribe = await A.next('subscribe');
  const page = client.history('late');
  const history = await A.next('history');
  const answers = {
    subscribed: { type: 'subscribed', pattern: 'late', seq: 11, epoch: 'e1', id: subscribe.id },
    published: { type: 'published', channel: 'late', id: publish.id, seq: 11 },
    unsubscribed: { type: 'unsubscribed', pattern: 'gone', seq: 11, id: unsubscribe.id },
    error: { type: 'error', message: 'no', code: 'unavailable', id: history.id },
  };
  return { ...made, A, heard, answer: answers[kind], settled: Promise.allSettled([leaving, published, subscribing, page]) };
}

/** A sends `goaway`. B has accepted the client, and has replied to no other request yet. */
async function takeOver(made) {
  made.A.say(GOAWAY);
  const B = await made.socket(1);
  await B.accept();
  await until(() => B.sent.some(({ type }) => type === 'subscribe'));
  return B;
}

/** Reply to all requests on the last connection, and check that it has the subscription. */
async function check({ client, heard, settled }, last) {
  const answering = setInterval(() => last.answer(11), 2);
  try {
    assert.notEqual(await outcome(settled), 'nothing', 'a request has no answer');
    await until(() => last.agreed.has('late'));
    last.say(message('late', 12));
    assert.deepEqual([client.connectionState, heard], ['connected', [12]]);
  } finally {
    clearInterval(answering);
  }
}

for (const kind of LATE) {
  test(`${kind} arrives on A before the move to B`, async () => {
    const made = await unanswered(kind);
    const { A, answer } = made;
    A.say(GOAWAY);
    const B = await made.socket(1);
    A.say(answer);
    await B.accept();
    await until(() => B.sent.some(({ type }) => type === 'subscribe'));
    A.lose(4504);
    await check(made, B);
  });

  test(`${kind} arrives on A during the move to B`, async () => {
    const made = await unanswered(kind);
    const { A, answer } = made;
    const B = await takeOver(made);
    A.say(answer);
    A.lose(4504);
    await check(made, B);
  });

  test(`${kind} arrives on A after the move to B`, async () => {
    const made = await unanswered(kind);
    const { A, answer } = made;
    const B = await takeOver(made);
    B.answer(11);
    A.say(answer);
    A.lose(4504);
    await check(made, B);
  });

  test(`${kind} arrives on A after the move to C`, async () => {
    const made = await unanswered(kind);
    const { A, answer } = made;
    const B = await takeOver(made);
    B.say(GOAWAY);
    A.lose(4504);
    B.lose(4504);
    const C = await made.socket(2);
    await C.accept();
    A.say(answer);
    B.say({ ...answer });
    await check(made, C);
  });
}

// Requests that never settle

const REFUSED = {
  'half of a surrogate pair': (client) => client.publish('a', 'party 🎉'.slice(0, -1)),
  'arrays in 100 arrays': (client) => client.publish('a', JSON.parse('['.repeat(100) + ']'.repeat(100))),
  'a channel that is undefined': (client) => client.publish(undefined, 1),
  'a channel that is a number': (client) => client.publish(7, 1),
  'a cursor below 0': (client) => client.subscribe('a', () => {}, { since: -1 }),
  'a cursor that is a number in quotes': (client) => client.subscribe('a', () => {}, { since: '5' }),
  'a cursor that is no number': (client) => client.subscribe('a', () => {}, { since: NaN }),
  'an epoch that is a number': (client) => client.subscribe('a', () => {}, { since: 1, epoch: 5 }),
  'a pattern that is undefined': (client) => client.subscribe(undefined, () => {}),
  'a handler that is none': (client) => client.subscribe('a'),
  'a page of 0 messages': (client) => client.history('a', { limit: 0 }),
  'a page before nowhere': (client) => client.history('a', { before: 'x' }),
  'the past of undefined': (client) => client.history(undefined),
};

for (const [what, call] of Object.entries(REFUSED)) {
  test(`client rejects at once: ${what}`, async () => {
    const made = scripted();
    const A = await made.connected();
    const error = await outcome(call(made.client));
    assert.ok(error instanceof TypeError || error instanceof RefusedError, `${error}`);
    assert.deepEqual(A.sent.filter(({ type }) => type !== 'auth'), []);
    // The error affects no other call.
    const published = made.client.publish('a', 1);
    await A.next('publish');
    A.answer();
    assert.equal((await published).seq, 11);
  });
}

test('error reply with bad_message rejects the request with its id', async () => {
  const made = scripted();
  const A = await made.connected();
  const calls = [made.client.publish('a', 1), made.client.subscribe('a', () => {}), made.client.history('a')];
  await until(() => A.sent.length === 4);
  for (const { id } of A.sent.slice(1)) A.say({ type: 'error', message: 'no', code: 'bad_message', id });
  for (const call of calls) assert.equal((await outcome(call)).code, 'bad_message');
});

test('publish that no broker understands does not block newer ones', async () => {
  const made = scripted();
  const A = await made.connected();
  const poison = outcome(made.client.publish('a', 'poison'));
  await A.next('publish');
  A.lose();
  const B = await made.socket(1);
  await B.accept();
  const { id } = await B.next('publish');
  const newer = made.client.publish('a', 'newer');
  B.say({ type: 'error', message: 'no', code: 'bad_message', id });
  B.say({ type: 'published', channel: 'a', id: (await B.next('publish')).id, seq: 11 });
  assert.equal((await outcome(newer)).seq, 11);
  assert.equal((await poison).code, 'unknown');
});

// Subscriptions

test('subscription closed during a resume is unsubscribed at the broker', async () => {
  const made = scripted();
  const A = await made.connected();
  const subscribing = made.client.subscribe('a', () => {});
  await A.next('subscribe');
  A.answer();
  const subscription = await subscribing;
  A.lose();
  const B = await made.socket(1);
  await B.accept();
  await B.next('subscribe');
  const leaving = subscription.unsubscribe();
  assert.equal((await B.next('unsubscribe')).pattern, 'a');
  B.answer();
  await leaving;
});

test('handlers of a pattern share one subscription, and the last one ends it', async () => {
  const made = scripted();
  const A = await made.connected();
  const heard = [[], [], []];
  const first = made.client.subscribe('a', ({ seq }) => heard[0].push(seq));
  await A.next('subscribe');
  A.answer();
  await first;
  const second = await made.client.subscribe('a', ({ seq }) => heard[1].push(seq));
  A.say(message('a', 11));
  const past = made.client.subscribe('a', ({ seq }) => heard[2].push(seq), { since: 9, epoch: 'e1' });
  const { since, id } = await A.next('subscribe');
  assert.equal(since, 9);
  A.say({ type: 'subscribed', pattern: 'a', seq: 11, epoch: 'e1', id }, message('a', 10), message('a', 11));
  A.say({ type: 'live', pattern: 'a', seq: 11 }, message('a', 12));
  A.answer();
  await past;
  assert.deepEqual(heard, [[11, 12], [11, 12], [10, 11, 12]]);
  await (await first).unsubscribe();
  await second.unsubscribe();
  assert.deepEqual(A.sent, []);
  const leaving = (await past).unsubscribe();
  await A.next('unsubscribe');
  A.answer();
  await leaving;
});

test('handler can be closed and subscribed again at once, as React does it', async () => {
  const made = scripted();
  const A = await made.connected();
  const heard = [];
  made.client.subscribe('a', () => assert.fail('it was left')).close();
  const again = made.client.subscribe('a', ({ seq }) => heard.push(seq));
  await until(() => A.sent.filter(({ type }) => type === 'subscribe').length === 2);
  A.answer();
  await again;
  A.say(message('a', 11));
  assert.deepEqual(heard, [11]);
});

test('subscription can be requested before a connection exists', async () => {
  const made = scripted();
  const subscribing = made.client.subscribe('a', () => {});
  const A = made.connected();
  const socket = await made.socket(0);
  await socket.next('subscribe');
  socket.answer();
  assert.equal((await outcome(subscribing)).pattern, 'a');
  await A;
});

// The network and the page

test('network change sends a ping at once', async () => {
  const page = new EventTarget();
  for (const name of ['addEventListener', 'removeEventListener']) globalThis[name] = page[name].bind(page);
  try {
    const made = scripted();
    const A = await made.connected();
    page.dispatchEvent(new Event('online'));
    await A.next('ping');
  } finally {
    for (const name of ['addEventListener', 'removeEventListener']) delete globalThis[name];
  }
});

// Other cases

test('disconnect during connect does not end the process', () => {
  const url = process.env.CATBUS_CLIENT ?? new URL('../src/catbus.js', import.meta.url).href;
  const script = `
    import { CatbusClient } from '${url}';
    class WebSocket { close() {} }
    const client = new CatbusClient({ url: 'ws://example.com/ws', token: 'x', WebSocket });
    client.connect();
    client.disconnect();
  `;
  const { status, stderr } = spawnSync(process.execPath, ['--input-type=module', '--eval', script]);
  assert.equal(status, 0, `${stderr}`);
});

test('calls of an async handler run in order, and a rejection is an error event', async () => {
  const made = scripted();
  const A = await made.connected();
  const told = [];
  const errors = [];
  const gates = new Map();
  made.client.on('error', (error) => errors.push(error.message));
  const subscribing = made.client.subscribe('a', async ({ seq }) => {
    told.push(`begin ${seq}`);
    await new Promise((resolve) => gates.set(seq, resolve));
    told.push(`end ${seq}`);
    if (seq === 11) throw new Error('mine');
  });
  await A.next('subscribe');
  A.answer();
  await subscribing;
  A.say(message('a', 11), message('a', 12));
  assert.deepEqual(told, ['begin 11']);
  for (const seq of [11, 12]) {
    await until(() => gates.has(seq));
    gates.get(seq)();
  }
  await until(() => told.length === 4);
  assert.deepEqual([told, errors], [['begin 11', 'end 11', 'begin 12', 'end 12'], ['mine']]);
});

test('errors keep their names in minified code', () => {
  assert.deepEqual([new RefusedError('unknown', '').name, new DisconnectedError('').name], ['RefusedError', 'DisconnectedError']);
  assert.equal(/name = new.target/.test(`${module.CatbusError}`), false);
});

test('token function that reports a sign-out is not called again', async (context) => {
  const clock = fakeClock(context);
  let asked = 0;
  const token = () => {
    asked++;
    throw new RefusedError('signed_out', 'signed out');
  };
  const made = scripted({ token });
  const error = await outcome(made.client.connect());
  assert.deepEqual([error.message, made.client.connectionState], ['signed out', 'disconnected']);
  await clock.pass(600_000);
  assert.equal(asked, 1);
});

test("subscriptions of one user end when another user connects", async () => {
  const made = scripted();
  const A = await made.connected();
  const ended = [];
  const subscribing = made.client.subscribe('a', () => {}, { onEnd: (error) => ended.push(error.code) });
  await A.next('subscribe');
  A.answer();
  await subscribing;
  await made.client.disconnect();
  const mine = made.client.subscribe('b', () => {});
  const connecting = made.client.connect();
  const B = await made.socket(1);
  await B.accept({ clientId: 'bob' });
  await connecting;
  await until(() => B.sent.some(({ type }) => type === 'subscribe'));
  assert.deepEqual(B.sent.filter(({ type }) => type === 'subscribe').map(({ pattern }) => pattern), ['b']);
  B.answer();
  await mine;
  assert.deepEqual(ended, ['unauthorized']);
});

test('connect has a timeout, and the attempts continue after it', async (context) => {
  const clock = fakeClock(context);
  const made = scripted({ connectTimeout: 60_000 });
  const waiting = made.client.connect({ timeout: 20_000 });
  await clock.pass(20_000);
  const error = await outcome(waiting);
  assert.deepEqual([error.name, error.final], ['DisconnectedError', false]);
  const connecting = made.client.connect();
  await (await made.socket(0)).accept();
  await connecting;
});

test('integers of any size keep their digits with bigint', async () => {
  const made = scripted({ bigint: true });
  const A = await made.connected();
  const heard = [];
  const subscribing = made.client.subscribe('a', ({ payload }) => heard.push(payload));
  await A.next('subscribe');
  A.answer();
  await subscribing;
  const payload = '{"n":12345678901234567890,"m":-9007199254740993,"s":"12345678901234567890","x":1.2345678901234567890,"i":7}';
  A.onmessage({ data: `{"type":"message","channel":"a","payload":${payload},"pattern":"a","seq":11,"at":1}` });
  assert.deepEqual(heard, [{ n: 12345678901234567890n, m: -9007199254740993n, s: '12345678901234567890', x: 1.2345678901234567, i: 7 }]);
  let sent;
  const { send } = A;
  A.send = (text) => ((sent = text), send.call(A, text));
  made.client.publish('a', { n: 12345678901234567890n }).catch(() => {});
  await A.next('publish');
  assert.match(sent, /"payload":\{"n":12345678901234567890\}/);
});
