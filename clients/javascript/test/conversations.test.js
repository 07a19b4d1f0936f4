// The conversations of `protocol/vectors`, spoken by the client: what is to be said is said by a call, and what comes of
// it is what is heard.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { conversations, play } from '../../../protocol/examples/client.mjs';
import { makeClient, skip } from './helpers.js';

/** What there is no call for. */
const CANNOT_BE_SAID = {
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
  'an object that does not decode is rejected by its id': [...Array(6).fill('unknown'), '{"type":undefined,"id":10}'],
};

/** Without what the client keeps for itself; of a refused `auth` it tells the refusal, not the closing code. */
function tellable(conversation) {
  const { steps, ...rest } = structuredClone(conversation);
  for (const { object } of steps) if (object?.type === 'auth_ok') for (const name of ['producer', 'floor']) delete object[name];
  return { ...rest, steps: steps.filter(({ hear, closed, object }) => !closed && !(hear && object?.type === 'live')) };
}

/** An object, or as its type a text that is none. */
function parse(text) {
  try {
    const value = JSON.parse(text);
    return Array.isArray(value) ? { type: text } : value;
  } catch {
    return { type: text };
  }
}

class Peer {
  passedOver;
  #client;
  #subscriptions = new Map();
  #heard = [];
  #wake = () => {};

  constructor(passedOver) {
    this.passedOver = passedOver;
  }

  async hear() {
    while (!this.#heard.length) await new Promise((resolve) => (this.#wake = resolve));
    return this.#heard.shift();
  }

  close() {
    return this.#client?.disconnect();
  }

  async say(text) {
    const message = parse(text);
    const call = this.#call(message);
    if (!call) {
      this.passedOver.push(message.type);
      return false;
    }
    await call;
  }

  /** The call that says it, if there is one. */
  #call(message) {
    const { type, pattern, protocol, producer, retry } = message;
    if (type === 'auth') return protocol && !producer && !this.#client ? this.#authenticate(message) : undefined;
    if (!this.#client || retry) return undefined;
    if (type === 'subscribe') return this.#subscribe(message);
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

  #tell(object) {
    this.#heard.push(object);
    this.#wake();
  }

  /** Tell what a request was answered, with what an answer repeats of it. */
  async #ask({ id, pattern, channel }, refusal, request) {
    const repeated = Object.fromEntries(Object.entries({ id, pattern, channel }).filter(([, value]) => value !== undefined));
    try {
      const answer = await request();
      if (answer) this.#tell({ ...repeated, ...answer });
    } catch (error) {
      this.#tell({ ...repeated, type: refusal, code: error.code, message: error.message });
    }
  }

  async #authenticate({ token }) {
    const client = makeClient({ token, autoReconnect: false });
    try {
      await client.connect();
    } catch (error) {
      this.#tell({ type: 'auth_error', code: error.code, message: error.message });
      return;
    }
    this.#client = client;
    // The epoch and the head are known of a subscription.
    const first = await client.subscribe('v.first', () => {});
    this.#tell({ type: 'auth_ok', client_id: client.id, epoch: first.epoch, head: first.cursor });
    await first.unsubscribe();
  }

  #subscribe(message) {
    const { id, pattern, since, epoch } = message;
    return this.#ask(message, 'subscribe_error', async () => {
      // What comes before the call returns is told after it.
      const early = [];
      let take = (object) => early.push(object);
      const onGap = (gap) => take({ type: 'gap', ...gap });
      const found = await this.#client.subscribe(pattern, (each) => take({ type: 'message', ...each }), { since, epoch, onGap });
      this.#subscriptions.set(pattern, found);
      take = (object) => this.#tell(object);
      for (const object of [{ type: 'subscribed', pattern, id, seq: found.cursor }, ...early]) this.#tell(object);
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

for (const conversation of conversations) {
  test(`conversation: ${conversation.name}`, { skip }, async () => {
    const passedOver = [];
    await play(tellable(conversation), () => new Peer(passedOver), process.env.CATBUS_SECRET);
    assert.deepEqual(passedOver, CANNOT_BE_SAID[conversation.name] ?? []);
  });
}
