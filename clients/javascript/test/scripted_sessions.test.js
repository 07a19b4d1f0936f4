// The sessions of `protocol/vectors/sessions.json`, run by the client: it sends by calls, and their results are the received
// objects.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { run, sessions } from '../../../protocol/examples/client.mjs';
import { makeClient, skip } from './helpers.js';

/** The messages for which the client has no call, by session. */
const CANNOT_BE_SENT = {
  'a publish that is sent again appears once': ['auth', 'publish', 'publish'], // it sends again by itself
  'requests without a grant are rejected, and the session continues': ['ping', 'unsubscribe', 'nonsense'],
  'a first-version client gets only what it knows': [
    'auth',
    'subscribe',
    'publish',
    'unsubscribe',
    'yjs_update',
    'yjs_awareness',
    'yjs_sync_request',
    'ping',
  ],
  'a value other than an object ends the session': ['[1]'],
  'the last of two values with one name counts': ['nothing'],
  'retained messages come first, and a publish over another one is a conflict': [
    ...Array(6).fill('publish'),
    'subscribe',
    'publish',
  ],
  'an object that does not decode is rejected by its id': [...Array(6).fill('unknown'), '{"type":undefined,"id":10}'],
  'members of a channel join, change and leave': ['subscribe', 'join', 'join', 'members', 'leave', 'leave'],
  'wrong requests about members are rejected, and the session continues': ['join', 'join', 'join', 'join', 'members', 'members', 'members'],
};

/** The session without the fields and steps that the client does not report: it reports a rejected `auth`, not the closing code. */
function reportable(session) {
  const { steps, ...rest } = structuredClone(session);
  for (const { object } of steps) if (object?.type === 'auth_ok') for (const name of ['producer', 'floor']) delete object[name];
  return { ...rest, steps: steps.filter(({ receive, closed, object }) => !closed && !(receive && object?.type === 'live')) };
}

/** The object in the text, or an object with the text as its type. */
function parse(text) {
  try {
    const value = JSON.parse(text);
    return Array.isArray(value) ? { type: text } : value;
  } catch {
    return { type: text };
  }
}

class Client {
  passedOver;
  #client;
  #subscriptions = new Map();
  #received = [];
  #wake = () => {};

  constructor(passedOver) {
    this.passedOver = passedOver;
  }

  async receive() {
    while (!this.#received.length) await new Promise((resolve) => (this.#wake = resolve));
    return this.#received.shift();
  }

  close() {
    return this.#client?.disconnect();
  }

  async send(text) {
    const message = parse(text);
    const call = this.#call(message);
    if (!call) {
      this.passedOver.push(message.type);
      return false;
    }
    await call;
  }

  /** The call that sends the message, if there is one. */
  #call(message) {
    const { type, pattern, protocol, producer, retry } = message;
    if (type === 'auth') return protocol && !producer && !this.#client ? this.#authenticate(message) : undefined;
    if (!this.#client || retry || 'retain' in message || 'expect' in message || 'retained' in message) return undefined;
    if (type === 'subscribe') return message.presence ? undefined : this.#subscribe(message);
    if (type === 'unsubscribe' && this.#subscriptions.has(pattern)) {
      return this.#ask(message, 'subscribe_error', async () => {
        await this.#subscriptions.get(pattern).unsubscribe();
        return { type: 'unsubscribed' };
      });
    }
    if (type === 'publish') return this.#publish(message);
    if (type === 'history') {
      return this.#ask(message, 'error', async () => {
        const { messages, more } = await this.#client.history(pattern, message);
        return { type: 'history', more, messages: messages.map((each) => ({ type: 'message', ...each })) };
      });
    }
    if (type === 'ping') return this.#ask(message, 'error', async () => (await this.#client.ping(), { type: 'pong', seq: message.seq }));
    return undefined;
  }

  #report(object) {
    this.#received.push(object);
    this.#wake();
  }

  /** Report the reply to a request, with the fields that a reply repeats. */
  async #ask({ id, pattern, channel }, errorType, request) {
    const repeated = Object.fromEntries(Object.entries({ id, pattern, channel }).filter(([, value]) => value !== undefined));
    try {
      const reply = await request();
      if (reply) this.#report({ ...repeated, ...reply });
    } catch (error) {
      this.#report({ ...repeated, type: errorType, code: error.code, message: error.message });
    }
  }

  async #authenticate({ token }) {
    const client = makeClient({ token, autoReconnect: false });
    try {
      await client.connect();
    } catch (error) {
      this.#report({ type: 'auth_error', code: error.code, message: error.message });
      return;
    }
    this.#client = client;
    // Only a subscription knows the epoch and the head.
    const first = await client.subscribe('v.first', () => {});
    this.#report({ type: 'auth_ok', client_id: client.id, epoch: first.epoch, head: first.cursor });
    await first.unsubscribe();
  }

  #subscribe(message) {
    const { id, pattern, since, epoch } = message;
    return this.#ask(message, 'subscribe_error', async () => {
      // Report objects that arrive before the call returns after it.
      const early = [];
      let take = (object) => early.push(object);
      const onGap = (gap) => take({ type: 'gap', ...gap });
      const found = await this.#client.subscribe(pattern, (each) => take({ type: 'message', ...each }), { since, epoch, onGap });
      this.#subscriptions.set(pattern, found);
      take = (object) => this.#report(object);
      for (const object of [{ type: 'subscribed', pattern, id, seq: found.cursor }, ...early]) this.#report(object);
    });
  }

  #publish(message) {
    const { channel, payload, ephemeral, echo, ack = true } = message;
    return this.#ask(message, 'publish_error', async () => {
      const { seq } = await this.#client.publish(channel, payload, { ephemeral, echo });
      return ack ? { type: 'published', ...(seq === undefined ? {} : { seq }) } : undefined;
    });
  }
}

for (const session of sessions) {
  test(`session: ${session.name}`, { skip }, async () => {
    const passedOver = [];
    await run(reportable(session), () => new Client(passedOver), process.env.CATBUS_SECRET);
    assert.deepEqual(passedOver, CANNOT_BE_SENT[session.name] ?? []);
  });
}
