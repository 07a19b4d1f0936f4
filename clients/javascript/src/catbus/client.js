/**
 * The client: the public calls around the core.
 *
 * @module
 */

import { checkDuration, checkFunction, checkInteger, checkPosition, checkText, encodeCursor } from './argument_checks.js';
import { Core } from './core.js';
import { constructorFor, drive } from './driver.js';
import { encodePayload, parseExact } from './payload_json.js';
import { kindOf, rememberWinner, routesTo } from './broker_addresses.js';
import { SubscriptionEntry, asMessage, handleOf } from './subscription_handle.js';
import { sizeError } from './in_flight_publishes.js';

/**
 * @import { ConnectionState, Events, HistoryOptions, Message, Options, Page, Published, SubscribeOptions, SubscriptionHandle } from './types.js'
 */

/** In milliseconds. */
const DURATIONS = {
  reconnectDelay: 1000,
  maxReconnectDelay: 30_000,
  pingInterval: 30_000,
  pingTimeout: 10_000,
  connectTimeout: 10_000,
  headStart: 300,
  upgradeInterval: 60_000,
};
const DEFAULTS = { ...DURATIONS, autoReconnect: true, reconnectJitter: 0.3, offlineQueue: true, maxQueueSize: 100 };

/** A client of a Catbus broker. `connect()` begins; what is asked for before that, and meanwhile, waits for a connection. */
export class CatbusClient {
  #core;
  #driver;
  #options;
  /** @type {Map<string, Set<(value: any) => void>>} */
  #handlers = new Map();

  /** @param {Options} options */
  constructor(options) {
    const { url, fallbackUrl, token } = options;
    for (const each of [url, fallbackUrl]) if (each !== undefined) kindOf(each);
    if (fallbackUrl !== undefined && kindOf(fallbackUrl) !== 'websocket') {
      throw new TypeError('fallbackUrl: begins with ws:// or wss://');
    }
    if (typeof token !== 'string') checkFunction('token', token ?? null);
    const all = { ...DEFAULTS, ...defined(options) };
    for (const name of Object.keys(DURATIONS)) checkDuration(name, /** @type {any} */ (all)[name], name === 'headStart' ? 0 : 1);
    this.#options = all;
    this.#core = new Core({
      ...all,
      routes: (kinds, now) => {
        const there = /** @type {const} */ (['webtransport', 'websocket']).filter((kind) => constructorFor(kind, all));
        return routesTo(url, fallbackUrl, there.filter((kind) => !kinds || kinds.includes(kind)), now);
      },
      won: (kind, now) => rememberWinner(url, kind, now),
      upgradable: kindOf(url) === 'webtransport' && constructorFor('webtransport', all) !== undefined,
      renewable: typeof token === 'function',
      parse: all.bigint ? parseExact : JSON.parse,
      random: Math.random,
    });
    this.#driver = drive(this.#core, all, (event, value) => this.#emit(event, value));
  }

  // What it is

  /** How it is connected. @returns {ConnectionState} */
  get connectionState() {
    return this.#core.state;
  }

  /** Who the token says you are, while connected. @returns {string | null} */
  get id() {
    return this.#core.present?.clientId ?? null;
  }

  /** By what it is connected. @returns {'webtransport' | 'websocket' | null} */
  get transport() {
    return this.#core.present?.kind ?? null;
  }

  /**
   * Be told of something, again and again. Returns a function that ends it.
   *
   * @template {keyof Events} T
   * @param {T} type @param {(value: Events[T]) => void} handler @returns {() => void}
   */
  on(type, handler) {
    checkFunction('handler', handler ?? null);
    const handlers = this.#handlers.get(type) ?? new Set();
    this.#handlers.set(type, handlers.add(handler));
    return () => void handlers.delete(handler);
  }

  /** Be told of each new state. Returns a function that ends it. @param {(state: ConnectionState) => void} handler @returns {() => void} */
  onStateChange(handler) {
    return this.on('state', handler);
  }

  // Connecting

  /**
   * Connect, and stay connected until `disconnect`. Resolves when it is connected for the first time. Rejects when the
   * broker says that coming back is no use, with `autoReconnect: false` when the first try fails, and after `timeout`
   * milliseconds (30000 unless said otherwise) while it goes on trying.
   *
   * @param {{timeout?: number | undefined}} [options] @returns {Promise<void>}
   */
  connect({ timeout = 30_000 } = {}) {
    try {
      checkDuration('timeout', timeout, 0);
    } catch (error) {
      return Promise.reject(error);
    }
    this.#driver.listen();
    /** @type {Promise<void>} */
    const connected = this.#driver.ask((core, settler) => core.connect(settler, timeout));
    // Nobody has to wait for it: the state and the event `error` tell the same.
    connected.catch(() => {});
    return connected;
  }

  /** Leave. SubscriptionManager go on with the next `connect`, from where they are; what is not answered is rejected. @returns {Promise<void>} */
  async disconnect() {
    this.#driver.leave();
  }

  // Subscribing

  /**
   * Have `handler` called with every message that matches, in the order of the log. It may be called at any time, and
   * begins when there is a connection.
   *
   * Returns a subscription at once. Awaiting it waits until the broker has agreed, and rejects with `RefusedError` when it
   * does not. A handler that is `async` is called again when it has finished; its rejection is an `error` event. Several
   * subscriptions of one pattern share one on the wire, each with its own start.
   *
   * @template [T=any]
   * @param {string} pattern @param {(message: Message<T>) => unknown} handler @param {SubscribeOptions} [options]
   * @returns {SubscriptionHandle}
   */
  subscribe(pattern, handler, options = {}) {
    return handleOf(this.#subscribe(pattern, handler, options));
  }

  /**
   * The messages that match, to be read by `for await`. What is not read waits: up to `buffer` messages here, and all the
   * others in the log, until there is room. Leaving the loop ends the subscription.
   *
   * @template [T=any]
   * @param {string} pattern @param {SubscribeOptions & {buffer?: number | undefined}} [options]
   * @returns {AsyncGenerator<Message<T>, void, void>}
   */
  async *messages(pattern, options = {}) {
    /** @type {{message: Message<T>, done: () => void} | undefined} */
    let waiting;
    let over = false;
    let wake = () => {};
    const { signal } = options;
    const onAbort = () => wake();
    signal?.addEventListener('abort', onAbort);
    /** @param {Message<T>} message @returns {Promise<void>} */
    const take = (message) =>
      new Promise((done) => {
        waiting = { message, done };
        wake();
      });
    const onEnd = (/** @type {Error} */ error) => {
      over = true;
      wake();
      options.onEnd?.(error);
    };
    const entry = this.#subscribe(pattern, take, { ...options, onEnd });
    try {
      await entry.ready;
      for (;;) {
        if (waiting) {
          const { message, done } = waiting;
          waiting = undefined;
          yield message;
          done();
        } else if (over) throw entry.failure;
        else if (signal?.aborted) throw signal.reason;
        else await new Promise((resolve) => (wake = () => resolve(undefined)));
      }
    } finally {
      signal?.removeEventListener('abort', onAbort);
      await entry.close();
    }
  }

  /**
   * @param {string} pattern @param {(message: Message) => unknown} handler
   * @param {SubscribeOptions & {buffer?: number | undefined}} options
   */
  #subscribe(pattern, handler, options) {
    const entry = new SubscriptionEntry(`${pattern}`, handler, options, this.#options.storage, {
      ask: (call) => this.#driver.perform((core) => call(core.subscriptions)),
      threw: report,
      reportError: (error) => this.#emit('error', error),
    });
    try {
      checkText('pattern', pattern);
      checkFunction('handler', handler ?? null);
      for (const name of /** @type {const} */ (['onGap', 'onLive', 'onEnd'])) checkFunction(name, options[name]);
      const { since, epoch, last, persist, signal, stream, datagrams, buffer } = options;
      let place = checkPosition('since', since, epoch);
      if (last !== undefined) checkInteger('last', last, 1);
      if (place && last !== undefined) throw new TypeError('since and last: only one of them');
      if (buffer !== undefined) checkInteger('buffer', buffer, 1);
      if (persist !== undefined) {
        checkText('persist', persist);
        place = kept(entry) ?? place;
      }
      if (signal?.aborted) throw signal.reason;
      const start = place ? { since: place.seq, epoch: place.epoch } : { last };
      this.#driver.perform(({ subscriptions }) => {
        entry.subscriber = subscriptions.add(pattern, { ...start, stream: stream === true, datagrams: datagrams === true }, entry);
      });
    } catch (error) {
      entry.ended(/** @type {Error} */ (error));
    }
    return entry;
  }

  // Publishing

  /**
   * Publish JSON. Resolves when it is committed, with its place in the log; an ephemeral one, when it was passed on. What
   * has no answer when the connection is lost is sent again on the next one, and appears once. Rejects with
   * `RefusedError`: after `unknown` it may have been published, after any other code it was not.
   *
   * @param {string} channel @param {unknown} payload
   * @param {{ephemeral?: boolean | undefined, echo?: boolean | undefined}} [options] `echo: false`: not back to this client
   * @returns {Promise<Published>}
   */
  async publish(channel, payload, { ephemeral = false, echo = true } = {}) {
    const json = encodePayload(payload);
    const body = `"channel":${JSON.stringify(checkText('channel', channel))},"payload":${json}${echo ? '' : ',"echo":false'}}`;
    const { limits = {} } = this.#core.present ?? {};
    const over = sizeError(body, limits);
    if (over) throw over;
    return this.#driver.ask((core, settler) => core.publish(body, ephemeral === true, settler));
  }

  // Asking

  /**
   * Messages of the past, oldest first: the newest `limit` of those between `after` and `before`. While the client
   * reconnects, it waits for the connection.
   *
   * @template [T=any]
   * @param {string} pattern @param {HistoryOptions} [options] @returns {Promise<Page<T>>}
   */
  async history(pattern, { limit, before, after } = {}) {
    checkText('pattern', pattern);
    if (limit !== undefined) checkInteger('limit', limit, 1);
    const upto = checkPosition('before', before)?.seq;
    const from = checkPosition('after', after)?.seq ?? 0;
    /** @type {any} */
    const { messages, more, epoch, head } = await this.#driver.ask((core, settler) => core.history(pattern, limit, upto, settler));
    /** @type {Message<T>[]} */
    const found = messages.filter((/** @type {any} */ { seq }) => seq > from).map((/** @type {any} */ each) => asMessage(each, epoch));
    const none = head === undefined ? undefined : encodeCursor(head, epoch);
    return { messages: found, more: more && found.length === messages.length, cursor: found.at(-1)?.cursor ?? none };
  }

  /** How long it takes to the broker and back. @returns {Promise<number>} milliseconds */
  async ping() {
    return this.#driver.ask((core, settler) => core.ping(settler));
  }

  // Notifier

  /** @param {string} type @param {any} value */
  #emit(type, value) {
    for (const handler of [...(this.#handlers.get(type) ?? [])]) {
      try {
        handler(value);
      } catch (error) {
        report(error);
      }
    }
  }
}

/** An error in a handler is its owner's, and stops nobody else. @param {unknown} error */
function report(error) {
  if (globalThis.reportError) globalThis.reportError(error);
  else console.error(error);
}

/** Where a subscription was before the page was loaded again. @param {SubscriptionEntry} entry */
function kept(entry) {
  try {
    return checkPosition('persist', entry.persisted?.load());
  } catch {
    return undefined; // Somebody else has written there.
  }
}

/** Without what is undefined: that is as if it was left out. @template T @param {T} options @returns {T} */
function defined(options) {
  return /** @type {T} */ (Object.fromEntries(Object.entries(/** @type {any} */ (options)).filter(([, value]) => value !== undefined)));
}
