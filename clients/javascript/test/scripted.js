/** A client with scripted sockets: the test plays the broker. */

import { after } from 'node:test';

/** CATBUS_CLIENT is the URL of another client to test. */
export const client = await import(process.env.CATBUS_CLIENT ?? '../src/catbus.js');

const EPOCH = 'e1';
const { setTimeout } = globalThis;

/** Wait until a condition holds. Fail after about a second. */
export async function until(condition, what = `${condition}`) {
  for (let polls = 0; !condition(); polls++) {
    if (polls > 400) throw new Error(`the condition does not hold: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}

/** The value or error of a promise, or `'nothing'` if it is pending after 150 ms. */
export const outcome = (promise) =>
  Promise.race([
    Promise.resolve(promise).then((value) => value, (error) => error),
    new Promise((resolve) => setTimeout(resolve, 150, 'nothing')),
  ]);

/** Replace the clock and the timers of one test by virtual ones. */
export function fakeClock({ mock }) {
  const timers = new Map();
  let now = performance.now();
  let ids = 0;
  mock.method(performance, 'now', () => now);
  mock.method(globalThis, 'setTimeout', (run, delay) => (timers.set(++ids, { run, at: now + delay }), ids));
  mock.method(globalThis, 'clearTimeout', (id) => timers.delete(id));
  return {
    /** Advance the clock, and run the timers that are due, in order. */
    async pass(ms) {
      const end = now + ms;
      for (;;) {
        await new Promise(setImmediate);
        const [[id, { run, at }] = [0, { at: Infinity }]] = [...timers].sort(([, a], [, b]) => a.at - b.at);
        if (at > end) break;
        timers.delete(id);
        now = Math.max(now, at);
        run();
      }
      now = end;
    },
  };
}

class Socket {
  readyState = 1;
  closed = undefined;
  /** The objects that the client has sent. */
  sent = [];
  /** The patterns with a `subscribed` reply on this socket. */
  agreed = new Set();
  #highestLoggedId = 0;

  constructor(sockets) {
    sockets.push(this);
    queueMicrotask(() => this.onopen?.({}));
  }

  send(text) {
    let depth = 0;
    let quoted = false;
    let start = 0;
    for (let at = 0; at < text.length; at++) {
      if (quoted) {
        if (text[at] === '\\') at++;
        else if (text[at] === '"') quoted = false;
      } else if (text[at] === '"') quoted = true;
      else if (text[at] === '{') depth++;
      else if (text[at] === '}' && --depth === 0) {
        this.sent.push(parse(text.slice(start, at + 1)));
        start = at + 1;
      }
    }
  }

  close(code = 1000) {
    this.closed = code;
  }

  /** Send objects from the broker. */
  say(...objects) {
    this.onmessage?.({ data: objects.map((object) => `${JSON.stringify(object)}\n`).join('') });
  }

  /** End the connection. */
  lose(code = 1006) {
    this.onclose?.({ code, reason: '' });
  }

  /** Wait for the next request of a type. */
  async next(type) {
    const find = () => this.sent.slice(this.#highestLoggedId).findIndex((each) => each?.type === type);
    await until(() => find() >= 0, `${type} after ${JSON.stringify(this.sent)}`);
    this.#highestLoggedId += find() + 1;
    return this.sent[this.#highestLoggedId - 1];
  }

  /** Accept the token. */
  async accept({ clientId = 'alice', head = 10, ...more } = {}) {
    await this.next('auth');
    this.say({ type: 'auth_ok', client_id: clientId, producer: `producer of ${clientId}`, epoch: EPOCH, head, floor: 1, limits: {}, ...more });
  }

  /** Send a successful reply to each request. */
  answer(seq = 10) {
    for (const { type, pattern, id, since, channel } of this.sent.splice(0)) {
      if (type === 'subscribe') {
        this.say({ type: 'subscribed', pattern, seq, epoch: EPOCH, id });
        this.agreed.add(pattern);
        if (since !== undefined) this.say({ type: 'live', pattern, seq });
      } else if (type === 'unsubscribe') this.say({ type: 'unsubscribed', pattern, seq, id });
      else if (type === 'publish') this.say({ type: 'published', channel, id, seq: ++seq });
      else if (type === 'history') this.say({ type: 'history', messages: [], more: false, id });
      else if (type === 'ping') this.say({ type: 'pong', seq: id });
    }
    this.#highestLoggedId = 0;
  }
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return { type: 'nonsense', text };
  }
}

/** A client, and the sockets that it opens. */
export function scripted(options = {}) {
  const sockets = [];
  const made = new client.CatbusClient({
    url: 'ws://example.com/ws',
    token: 'a token',
    reconnectDelay: 10,
    WebSocket: class extends Socket {
      constructor() {
        super(sockets);
      }
    },
    ...options,
  });
  made.on('error', () => {});
  after(() => made.disconnect());
  return {
    client: made,
    sockets,
    /** Wait for the socket with this index. */
    async socket(number) {
      await until(() => sockets.length > number, `socket ${number}`);
      return sockets[number];
    },
    /** Connect over the first socket. */
    async connected() {
      const connecting = made.connect();
      const socket = await this.socket(0);
      await socket.accept();
      await connecting;
      return socket;
    },
  };
}

export const message = (pattern, seq, payload = seq) => ({ type: 'message', channel: pattern, payload, pattern, seq, at: 1 });
export const GOAWAY = { type: 'goaway', reason: 'stopping', reconnect_in: 0 };
