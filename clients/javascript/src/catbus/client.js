/**
 * The client: the public calls around the core.
 *
 * @module
 */

import { checkDuration, checkFunction, checkInteger, checkPosition, checkText, encodeCursor } from './argument_checks.js';
import { Core } from './core.js';
import { constructorFor, drive } from './driver.js';
import { encodePayload, parseExact } from './payload_json.js';
import { join } from './membership_handle.js';
import { LiveMaps } from './live_maps.js';
import { PresenceFeed } from './presence_feed.js';
import { PresenceState, asMember } from './presence_state.js';
import { RetainedFeed } from './retained_feed.js';
import { RetainedState } from './retained_state.js';
import { kindOf, rememberWinner, routesTo } from './broker_addresses.js';
import { SubscriptionEntry, asMessage, handleOf } from './subscription_handle.js';
import { sizeError } from './in_flight_publishes.js';

/**
 * @import { ConnectionState, Events, HistoryOptions, LiveOptions, MembersPage, MembershipHandle, Message, Options, Page } from './types.js'
 * @import { PresenceMap, PublishOptions, Published, RetainedMap, SubscribeOptions, SubscriptionHandle } from './types.js'
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

/** A client of a Catbus broker. Requests before `connect()`, and while there is no connection, wait for one. */
export class CatbusClient {
  #core;
  #driver;
  #options;
  #presence;
  #retained;
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
    const { perform } = (this.#driver = drive(this.#core, all, (event, value) => this.#emit(event, value)));
    const host = { perform: (/** @type {(subscriptions: Core['subscriptions']) => void} */ call) => perform((core) => call(core.subscriptions)), threw: report };
    this.#retained = new LiveMaps(RetainedState, RetainedFeed, host);
    this.#presence = new LiveMaps(PresenceState, PresenceFeed, host);
  }

  // State

  /** The state of the connection. @returns {ConnectionState} */
  get connectionState() {
    return this.#core.state;
  }

  /** The client_id of the token, while connected. @returns {string | null} */
  get id() {
    return this.#core.present?.clientId ?? null;
  }

  /** The transport, while connected. @returns {'webtransport' | 'websocket' | null} */
  get transport() {
    return this.#core.present?.kind ?? null;
  }

  /**
   * Call a handler for each event of a type. Returns a function that removes it.
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

  /** Call a handler for each new state. Returns a function that removes it. @param {(state: ConnectionState) => void} handler @returns {() => void} */
  onStateChange(handler) {
    return this.on('state', handler);
  }

  // Connecting

  /**
   * Connect, and stay connected until `disconnect`. Resolves with the first connection. Rejects after a final
   * error, with `autoReconnect: false` when the first attempt fails, and after `timeout` milliseconds (default 30000),
   * while the client keeps trying.
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
    // The application need not await it: the state and the event `error` report the same.
    connected.catch(() => {});
    return connected;
  }

  /** Disconnect. Subscriptions resume at their cursors with the next `connect`; requests without a reply are rejected. @returns {Promise<void>} */
  async disconnect() {
    this.#driver.leave();
  }

  // Subscribing

  /**
   * Call `handler` with every message that matches, in the order of the log. The subscription starts when there is a
   * connection.
   *
   * Returns a subscription at once. Awaiting it waits until the broker has accepted it, and rejects with `RefusedError`
   * otherwise. An `async` handler is called again when it has finished; its rejection is an `error` event. Several
   * subscriptions of one pattern share one at the broker, each with its own start.
   *
   * @template [T=any]
   * @param {string} pattern @param {(message: Message<T>) => unknown} handler @param {SubscribeOptions} [options]
   * @returns {SubscriptionHandle}
   */
  subscribe(pattern, handler, options = {}) {
    return handleOf(this.#subscribe(pattern, handler, options));
  }

  /**
   * The messages that match, for `for await`. Unread messages wait: up to `buffer` here, and all others in the log.
   * Leaving the loop ends the subscription.
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
   * Publish JSON. Resolves with its seq when it is committed; an ephemeral message, when it is delivered. If the connection
   * is lost before the reply, it is sent again on the next one, and is in the log once. Rejects with `RefusedError`:
   * after `unknown` it may have been published, after any other code it was not.
   *
   * With `retain` it becomes the retained message of its channel; the payload `null` removes that. With `expect` it rejects
   * with the code `conflict`, and the present `seq`, unless the retained message has the expected seq.
   *
   * @param {string} channel @param {unknown} payload @param {PublishOptions} [options] @returns {Promise<Published>}
   */
  async publish(channel, payload, { ephemeral = false, echo = true, retain = false, expect } = {}) {
    const json = encodePayload(payload);
    if (expect !== undefined) checkInteger('expect', expect, 0);
    const more = `${retain ? ',"retain":true' : ''}${expect === undefined ? '' : `,"expect":${expect}`}${echo ? '' : ',"echo":false'}`;
    const body = `"channel":${JSON.stringify(checkText('channel', channel))},"payload":${json}${more}}`;
    const { limits = {} } = this.#core.present ?? {};
    const over = sizeError(body, limits);
    if (over) throw over;
    return this.#driver.ask((core, settler) => core.publish(body, ephemeral === true, settler, expect === 0));
  }

  // Retained messages and presence

  /**
   * The retained messages that match, as a map by channel that stays up to date. Resolves when it is complete. Several maps
   * of a pattern share one subscription at the broker.
   *
   * @template [T=any]
   * @param {string} pattern @param {LiveOptions} [options] @returns {Promise<RetainedMap<T>>}
   */
  async retained(pattern, options = {}) {
    return this.#retained.open(pattern, options);
  }

  /**
   * The members of all channels that match, as a map by channel that stays up to date. Resolves when it is complete.
   *
   * @template [I=any]
   * @param {string} pattern @param {LiveOptions} [options] @returns {Promise<PresenceMap<I>>}
   */
  async presence(pattern, options = {}) {
    return this.#presence.open(pattern, options);
  }

  /**
   * Become a member of a channel, and stay one on each connection until `leave()`. Several memberships of a channel are one
   * at the broker, with the newest info.
   *
   * Returns a membership at once. Awaiting it waits until the broker has accepted it.
   *
   * @param {string} channel @param {unknown} [info] JSON of up to 1024 bytes @param {LiveOptions} [options] @returns {MembershipHandle}
   */
  join(channel, info, options = {}) {
    return join(channel, info, options, {
      ask: (call) => this.#driver.ask((core, settler) => call(core.memberships, settler)),
      threw: report,
      reportError: (error) => this.#emit('error', error),
    });
  }

  /**
   * A page of the members of all channels that match. While the client reconnects, it waits for the connection.
   *
   * @template [I=any]
   * @param {string} pattern @param {{limit?: number | undefined, after?: string | undefined}} [options] `after`: `next` of the page before
   * @returns {Promise<MembersPage<I>>}
   */
  async members(pattern, { limit, after } = {}) {
    checkText('pattern', pattern);
    if (limit !== undefined) checkInteger('limit', limit, 1);
    if (after !== undefined) checkText('after', after);
    /** @type {any} */
    const { members, next } = await this.#driver.ask((core, settler) => core.members(pattern, limit, after, settler));
    return { members: members.map(asMember), next };
  }

  // History and ping

  /**
   * A page of the log, oldest message first: the newest `limit` messages between `after` and `before`. While the client
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

  /** The round-trip time to the broker. @returns {Promise<number>} milliseconds */
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

/** Report an error of a handler, which must not affect other handlers. @param {unknown} error */
function report(error) {
  if (globalThis.reportError) globalThis.reportError(error);
  else console.error(error);
}

/** The stored cursor of a subscription, or undefined. @param {SubscriptionEntry} entry */
function kept(entry) {
  try {
    return checkPosition('persist', entry.persisted?.load());
  } catch {
    return undefined; // Another program has written there.
  }
}

/** The options without undefined values, which count as left out. @template T @param {T} options @returns {T} */
function defined(options) {
  return /** @type {T} */ (Object.fromEntries(Object.entries(/** @type {any} */ (options)).filter(([, value]) => value !== undefined)));
}
