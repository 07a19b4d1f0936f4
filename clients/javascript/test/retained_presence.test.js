/** Retained messages and presence, with a scripted broker. */

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { GOAWAY, client as module, message, outcome, scripted, until } from './scripted.js';

const { RefusedError } = module;
const row = (channel, seq, payload = seq) => ({ type: 'message', channel, payload, seq, at: seq, sender: 'bob', retain: true });
const shown = (map) => Object.fromEntries([...map].map(([channel, { payload }]) => [channel, payload]));

/** A broker's subscription: `take` waits for the next `subscribe`, `accept` replies to it. */
async function take(socket, seq = 10, epoch = 'e1') {
  const { type, id, ...request } = await socket.next('subscribe');
  socket.say({ type: 'subscribed', pattern: request.pattern, seq, epoch, id });
  return request;
}

function snapshot(socket, pattern, rows, seq = 10) {
  socket.say(...rows.map((each) => ({ type: 'retained', pattern, messages: [each], complete: false })));
  socket.say({ type: 'retained', pattern, messages: [], complete: true }, { type: 'live', pattern, seq });
}

async function opened(rows = [row('a.x', 3), row('a.y', 5)]) {
  const made = scripted();
  const socket = await made.connected();
  const opening = made.client.retained('a.*');
  assert.deepEqual(await take(socket), { pattern: 'a.*', retained: true });
  snapshot(socket, 'a.*', rows);
  const map = await opening;
  const changes = [];
  map.onChange(({ channel, message: now, previous }) => changes.push([channel, now?.payload, previous?.payload]));
  return { ...made, first: socket, map, changes };
}

test('map is complete before it is handed over, and follows the messages that were retained', async () => {
  const made = scripted();
  const socket = await made.connected();
  const opening = made.client.retained('a.*');
  await take(socket);
  socket.say({ type: 'retained', pattern: 'a.*', messages: [row('a.x', 3)], complete: false });
  assert.equal(await outcome(opening), 'nothing');
  // `a.y` has changed while the broker read: it was left out, and comes as a message.
  socket.say({ type: 'retained', pattern: 'a.*', messages: [row('a.z', 4)], complete: true });
  assert.equal(await outcome(opening), 'nothing');
  socket.say({ ...row('a.y', 11), pattern: 'a.*' }, { type: 'live', pattern: 'a.*', seq: 11 });
  const map = await opening;
  assert.deepEqual(map.get('a.x'), { payload: 3, seq: 3, at: 3, sender: 'bob' });
  assert.deepEqual([shown(map), map.size, map.has('a.y'), map.has('a.q'), map.pattern], [{ 'a.x': 3, 'a.y': 11, 'a.z': 4 }, 3, true, false, 'a.*']);
  assert.deepEqual([[...map.keys()].length, [...map.values()].length, [...map.entries()].length, new Map(map).size], [3, 3, 3, 3]);
  const changes = [];
  const stop = map.onChange((change) => changes.push(change));
  const { pattern, type, retain, channel, ...previous } = row('a.y', 11);
  socket.say({ ...row('a.y', 12), pattern: 'a.*' }, message('a.*', 13), { ...row('a.x', 14, null), pattern: 'a.*' }, { ...row('a.q', 15, null), pattern: 'a.*' });
  assert.deepEqual(changes[0], { channel: 'a.y', message: { payload: 12, seq: 12, at: 12, sender: 'bob' }, previous });
  assert.deepEqual(changes.map(({ channel: of, message: now }) => [of, now?.payload]), [['a.y', 12], ['a.x', undefined]]);
  stop();
  socket.say({ ...row('a.y', 16), pattern: 'a.*' });
  assert.deepEqual([changes.length, map.get('a.y').seq], [2, 16]);
});

test('map resumes without since until it was live, and with since after that', async () => {
  const made = scripted();
  const socket = await made.connected();
  const opening = made.client.retained('a.*');
  await take(socket);
  socket.say({ type: 'retained', pattern: 'a.*', messages: [row('a.gone', 3)], complete: false });
  socket.lose();
  const second = await made.socket(1);
  await second.accept();
  assert.deepEqual(await take(second, 12), { pattern: 'a.*', retained: true });
  // A replica that lags could say `live` before a message that this snapshot has left out.
  second.say({ type: 'retained', pattern: 'a.*', messages: [row('a.gone', 4)], complete: true });
  second.lose();
  const third = await made.socket(2);
  await third.accept();
  assert.deepEqual(await take(third, 13), { pattern: 'a.*', retained: true });
  third.say({ type: 'retained', pattern: 'a.*', messages: [row('a.x', 4)], complete: true });
  third.say({ ...row('a.y', 15), pattern: 'a.*' }, { type: 'live', pattern: 'a.*', seq: 20 });
  assert.deepEqual(shown(await opening), { 'a.x': 4, 'a.y': 15 });
  third.say(GOAWAY);
  const fourth = await made.socket(3);
  await fourth.accept();
  assert.deepEqual(await take(fourth, 20), { pattern: 'a.*', since: 20, epoch: 'e1', retained: true });
});

test('snapshot after a gap replaces the map at its end, and listeners are told of differences only', async () => {
  const { first: socket, map, changes, client } = await opened([row('a.x', 3), row('a.y', 5), row('a.z', 6)]);
  client.on('gap', () => assert.fail('the map has all of the state'));
  socket.say({ type: 'gap', pattern: 'a.*', from: 11, to: 30, epoch: 'e1', reason: 'retention' });
  socket.say({ type: 'retained', pattern: 'a.*', messages: [row('a.x', 3), row('a.y', 25)], complete: false });
  assert.deepEqual([changes, map.size], [[], 3]);
  socket.say({ type: 'retained', pattern: 'a.*', messages: [], complete: true }, { type: 'live', pattern: 'a.*', seq: 30 });
  assert.deepEqual(changes, [['a.y', 25, 5], ['a.z', undefined, 6]]);
  assert.deepEqual(shown(map), { 'a.x': 3, 'a.y': 25 });
  // The same seq in another epoch is another message.
  socket.say({ type: 'gap', pattern: 'a.*', from: 3, to: 2, epoch: 'e2', reason: 'epoch' });
  socket.say({ type: 'retained', pattern: 'a.*', messages: [{ ...row('a.x', 3, 'other'), at: 77 }], complete: true }, { type: 'live', pattern: 'a.*', seq: 3 });
  assert.deepEqual(changes.slice(2), [['a.x', 'other', 3], ['a.y', undefined, 25]]);
});

test('connection that is lost in the snapshot after a gap causes another snapshot', async () => {
  const { map, changes, first, ...made } = await opened();
  first.say({ type: 'gap', pattern: 'a.*', from: 11, to: 30, epoch: 'e1', reason: 'retention' });
  first.say({ type: 'retained', pattern: 'a.*', messages: [row('a.x', 29)], complete: false });
  first.lose();
  const second = await made.socket(1);
  await second.accept();
  assert.deepEqual(await take(second, 40), { pattern: 'a.*', retained: true });
  snapshot(second, 'a.*', [row('a.y', 5)], 40);
  assert.deepEqual([shown(map), changes], [{ 'a.y': 5 }, [['a.x', undefined, 3]]]);
});

test('maps of one pattern share one subscription, and the last one ends it', async () => {
  const { first: socket, map, client } = await opened();
  const controller = new AbortController();
  const other = await client.retained('a.*', { signal: controller.signal, onEnd: () => assert.fail('it was wanted') });
  assert.deepEqual(shown(other), shown(map));
  await map.close();
  socket.say({ ...row('a.x', 11), pattern: 'a.*' });
  assert.deepEqual([other.get('a.x').seq, map.get('a.x').seq], [11, 3]);
  assert.deepEqual(socket.sent.filter(({ type }) => type === 'subscribe').length, 1);
  assert.ok(!socket.sent.some(({ type }) => type === 'unsubscribe'));
  controller.abort(new Error('enough'));
  assert.equal((await socket.next('unsubscribe')).pattern, 'a.*');
  await assert.rejects(client.retained('a.*', { signal: controller.signal }), { message: 'enough' });
});

test('handler and map of one pattern work in either order', async () => {
  const made = scripted();
  const socket = await made.connected();
  const heard = [];
  const first = made.client.subscribe('a.*', ({ seq, retain }) => heard.push([seq, retain]));
  await take(socket);
  await first;
  const opening = made.client.retained('a.*');
  assert.deepEqual(await take(socket, 12), { pattern: 'a.*', retained: true });
  snapshot(socket, 'a.*', [row('a.x', 3)], 12);
  const map = await opening;
  // The handler continues at 12, and is not requested again.
  const second = await made.client.subscribe('a.*', ({ seq, retain }) => heard.push([seq, retain]));
  assert.equal(second.cursor, 12);
  socket.say({ ...row('a.x', 13), pattern: 'a.*' }, message('a.*', 14));
  assert.deepEqual(heard, [[13, true], [13, true], [14, undefined], [14, undefined]]);
  assert.equal(map.get('a.x').seq, 13);
  assert.equal(socket.sent.filter(({ type }) => type === 'subscribe').length, 2);
  await map.close();
  // The broker need not send snapshots any more.
  assert.deepEqual(await take(socket, 14), { pattern: 'a.*', since: 14, epoch: 'e1' });
});

test('handler that is behind is requested first, and the map has its snapshot after that', async () => {
  const made = scripted();
  const socket = await made.connected();
  const heard = [];
  made.client.subscribe('a.*', ({ seq }) => heard.push(seq), { since: 5, epoch: 'e1' });
  const opening = made.client.retained('a.*');
  await socket.next('subscribe');
  assert.deepEqual(await take(socket, 10), { pattern: 'a.*', since: 5, epoch: 'e1', retained: true });
  socket.say(message('a.*', 7), { type: 'live', pattern: 'a.*', seq: 10 });
  assert.deepEqual(await take(socket, 10), { pattern: 'a.*', retained: true });
  snapshot(socket, 'a.*', [row('a.x', 3)]);
  assert.deepEqual([heard, shown(await opening)], [[7], { 'a.x': 3 }]);
});

test('map ends with the reason of the broker', async () => {
  const { first: socket, map, client } = await opened();
  const ended = [];
  const other = await client.retained('a.*', { onEnd: ({ code }) => ended.push(code) });
  socket.say({ type: 'revoked', pattern: 'a.*', seq: 10 });
  assert.deepEqual([ended, shown(map), shown(other)], [['revoked'], { 'a.x': 3, 'a.y': 5 }, { 'a.x': 3, 'a.y': 5 }]);
  const refused = client.retained('b');
  const { id } = await socket.next('subscribe');
  socket.say({ type: 'subscribe_error', pattern: 'b', id, code: 'unauthorized', message: 'no' });
  await assert.rejects(refused, { code: 'unauthorized' });
  // A pattern can be opened again after its end.
  const again = client.retained('a.*');
  assert.deepEqual(await take(socket), { pattern: 'a.*', retained: true });
  snapshot(socket, 'a.*', [row('a.x', 4)]);
  assert.deepEqual(shown(await again), { 'a.x': 4 });
});

test('error in a listener affects no other listener', async (context) => {
  const told = context.mock.method(console, 'error', () => {});
  const { first: socket, map, changes } = await opened();
  map.onChange(() => {
    throw new Error('mine');
  });
  map.onChange(() => changes.push('after it'));
  socket.say({ ...row('a.x', 11), pattern: 'a.*' });
  assert.deepEqual([changes, told.mock.callCount()], [[['a.x', 11, 3], 'after it'], 1]);
});

// Publishing

test('publish with expect rejects with the present seq', async () => {
  const made = scripted();
  const socket = await made.connected();
  const publishing = made.client.publish('a.x', { n: 1 }, { retain: true, expect: 4 });
  const { id, type, ...request } = await socket.next('publish');
  assert.deepEqual(request, { channel: 'a.x', payload: { n: 1 }, retain: true, expect: 4 });
  socket.say({ type: 'publish_error', channel: 'a.x', id, code: 'conflict', seq: 7, message: 'another one' });
  await assert.rejects(publishing, (error) => error instanceof RefusedError && error.code === 'conflict' && error.seq === 7);
  for (const expect of [-1, 1.5, '4', null]) await assert.rejects(made.client.publish('a.x', 1, { retain: true, expect }), TypeError);
});

for (const [expect, code] of [[4, 'conflict'], [0, 'unknown']]) {
  test(`retry with expect ${expect} and a conflict rejects with ${code}`, async () => {
    const made = scripted();
    const socket = await made.connected();
    const publishing = made.client.publish('a.x', 1, { retain: true, expect });
    await socket.next('publish');
    socket.lose();
    const second = await made.socket(1);
    await second.accept({ producer: 'producer of alice' });
    const { id, retry } = await second.next('publish');
    assert.equal(retry, true);
    second.say({ type: 'publish_error', channel: 'a.x', id, code: 'conflict', seq: 7, message: 'another one' });
    await assert.rejects(publishing, { code });
  });
}

// Presence

const alice = { channel: 'room', client_id: 'alice', sessions: 1, info: { name: 'Alice' } };
const nobody = { channel: 'room', session: 'p4mY', sessions: 1 };

async function watching() {
  const made = scripted();
  const socket = await made.connected();
  const opening = made.client.presence('room');
  assert.deepEqual(await take(socket), { pattern: 'room', presence: true });
  socket.say({ type: 'members', pattern: 'room', members: [alice], complete: false });
  assert.equal(await outcome(opening), 'nothing');
  socket.say({ type: 'members', pattern: 'room', members: [nobody], complete: true });
  const map = await opening;
  const changes = [];
  map.onChange(({ action, channel, member }) => changes.push([action, channel, member.clientId ?? member.session, member.sessions]));
  return { ...made, first: socket, map, changes };
}
const present = (map) => (map.get('room') ?? []).map(({ clientId, session, sessions }) => [clientId ?? session, sessions]);

test('presence has the members, and tells of true changes', async () => {
  const { first: socket, map, changes } = await watching();
  assert.deepEqual(map.get('room'), [
    { channel: 'room', clientId: 'alice', session: undefined, sessions: 1, info: { name: 'Alice' } },
    { channel: 'room', clientId: undefined, session: 'p4mY', sessions: 1, info: undefined },
  ]);
  const before = map.get('room');
  const say = (action, member) => socket.say({ type: 'presence', pattern: 'room', action, ...member });
  say('update', { ...alice, sessions: 2 });
  say('update', { ...alice, sessions: 2 });
  say('join', { channel: 'room', client_id: 'bob', sessions: 1 });
  say('leave', { ...nobody, sessions: 0 });
  say('leave', { ...nobody, sessions: 0 });
  assert.deepEqual(changes, [['update', 'room', 'alice', 2], ['join', 'room', 'bob', 1], ['leave', 'room', 'p4mY', 1]]);
  assert.deepEqual([present(map), before.length], [[['alice', 2], ['bob', 1]], 2]);
  say('leave', { ...alice, sessions: 0 });
  say('leave', { channel: 'room', client_id: 'bob', sessions: 0 });
  assert.deepEqual([map.size, map.has('room')], [0, false]);
});

test('each connection, and each loss of changes, brings a snapshot of the members', async () => {
  const { first: socket, map, changes, ...made } = await watching();
  socket.say({ type: 'members', pattern: 'room', members: [alice], complete: false });
  // A change of a page that was sent already.
  socket.say({ type: 'presence', pattern: 'room', action: 'update', ...alice, sessions: 3 });
  assert.deepEqual(changes, []);
  socket.say({ type: 'members', pattern: 'room', members: [{ channel: 'room', client_id: 'bob', sessions: 1 }], complete: true });
  assert.deepEqual(changes, [['leave', 'room', 'p4mY', 1], ['update', 'room', 'alice', 3], ['join', 'room', 'bob', 1]]);
  socket.lose();
  const second = await made.socket(1);
  await second.accept();
  assert.deepEqual(await take(second), { pattern: 'room', presence: true });
  assert.deepEqual(present(map), [['alice', 3], ['bob', 1]]);
  second.say({ type: 'members', pattern: 'room', members: [{ ...alice, sessions: 3 }], complete: true });
  assert.deepEqual(changes.slice(3), [['leave', 'room', 'bob', 1]]);
});

test('members are pages', async () => {
  const made = scripted();
  const socket = await made.connected();
  const asking = made.client.members('room', { limit: 1, after: 'here' });
  const { id, ...request } = await socket.next('members');
  assert.deepEqual(request, { type: 'members', pattern: 'room', limit: 1, after: 'here' });
  socket.say({ type: 'members', members: [nobody], next: 'there', id });
  assert.deepEqual(await asking, { members: [{ channel: 'room', clientId: undefined, session: 'p4mY', sessions: 1, info: undefined }], next: 'there' });
});

test('client joins no more channels than the broker allows', async () => {
  const { client, ...made } = scripted();
  const connecting = client.connect();
  const socket = await made.socket(0);
  const first = client.join('room', 1);
  await socket.accept({ limits: { joined_channels: 1 } });
  await connecting;
  const { id } = await socket.next('join');
  socket.say({ type: 'joined', channel: 'room', id });
  const membership = await first;
  const ended = [];
  await assert.rejects(async () => client.join('hall', 1, { onEnd: ({ code }) => ended.push(code) }), { code: 'limit', message: /join 1 channels/ });
  assert.deepEqual([ended, socket.sent.filter(({ channel }) => channel === 'hall')], [['limit'], []]);
  // Another use of a channel needs no room, and a channel that was left makes room.
  const again = client.join('room', 2);
  socket.say({ type: 'joined', channel: 'room', id: (await socket.next('join')).id });
  await (await again).leave();
  const leaving = membership.leave();
  socket.say({ type: 'left', channel: 'room', id: (await socket.next('leave')).id });
  await leaving;
  const third = client.join('hall', 1);
  socket.say({ type: 'joined', channel: 'hall', id: (await socket.next('join')).id });
  await third;
});

test('membership is restored on each connection until it is left', async () => {
  const made = scripted();
  const { client } = made;
  const joining = client.join('room', { name: 'Alice' });
  assert.equal(joining.channel, 'room');
  const socket = await made.connected();
  const { id, ...request } = await socket.next('join');
  assert.deepEqual(request, { type: 'join', channel: 'room', info: { name: 'Alice' } });
  socket.say({ type: 'joined', channel: 'room', id });
  const membership = await joining;
  const updating = membership.update({ name: 'A.' });
  const update = await socket.next('join');
  assert.deepEqual(update.info, { name: 'A.' });
  // The reply is lost with the connection.
  socket.lose();
  const second = await made.socket(1);
  await second.accept();
  const again = await second.next('join');
  assert.deepEqual(again.info, { name: 'A.' });
  second.say({ type: 'joined', channel: 'room', id: again.id });
  await updating;
  second.say(GOAWAY);
  const third = await made.socket(2);
  await third.accept();
  await third.next('join');
  const leaving = membership.leave();
  const leave = await third.next('leave');
  third.say({ type: 'left', channel: 'room', id: leave.id });
  await leaving;
  await assert.rejects(membership.update(), { code: 'closed' });
  third.lose();
  const fourth = await made.socket(3);
  await fourth.accept();
});

test('handles of one channel are one membership, with the newest info', async () => {
  const made = scripted();
  const socket = await made.connected();
  const accept = async (info) => {
    const { id, info: said } = await socket.next('join');
    assert.deepEqual(said, info);
    socket.say({ type: 'joined', channel: 'room', id });
  };
  const one = made.client.join('room', 1);
  await accept(1);
  const two = made.client.join('room', 2);
  await accept(2);
  await (await two).leave();
  await accept(1);
  assert.ok(!socket.sent.some(({ type }) => type === 'leave'));
  const leaving = one.leave();
  const { id } = await socket.next('leave');
  socket.say({ type: 'left', channel: 'room', id });
  await leaving;
});

test('rejected info leaves the membership as it is, and a rejected channel ends it', async () => {
  const made = scripted();
  const socket = await made.connected();
  const refuse = async (code) => socket.say({ type: 'error', id: (await socket.next('join')).id, code, message: 'no' });
  const accept = async () => socket.say({ type: 'joined', channel: 'room', id: (await socket.next('join')).id });
  const ended = [];
  const membership = made.client.join('room', 1, { onEnd: ({ code }) => ended.push(code) });
  await refuse('overloaded');
  await accept();
  await membership;
  const updating = membership.update('x'.repeat(2000));
  await refuse('too_large');
  await assert.rejects(updating, { code: 'too_large' });
  assert.equal((await socket.next('join')).info, 1);
  assert.deepEqual(ended, []);
  const refused = made.client.join('secret');
  await refuse('unauthorized');
  await assert.rejects(refused.ready, { code: 'unauthorized' });
  await assert.rejects(made.client.join('room', undefined, { signal: AbortSignal.abort() }).ready, { name: 'AbortError' });
  await assert.rejects(made.client.join('room', () => {}).ready, TypeError);
});

test('membership ends when its permission is withdrawn', async () => {
  const made = scripted();
  const socket = await made.connected();
  const ended = [];
  const membership = made.client.join('room', 1, { onEnd: ({ code }) => ended.push(code) });
  socket.say({ type: 'joined', channel: 'room', id: (await socket.next('join')).id });
  await membership;
  socket.say({ type: 'left', channel: 'room' });
  assert.deepEqual(ended, ['revoked']);
  await membership.leave();
  assert.ok(!socket.sent.some(({ type }) => type === 'leave'));
});
