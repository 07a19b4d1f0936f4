/**
 * The subscription object of the application, and the queue of its handler.
 *
 * @module
 */

import { encodeCursor } from './argument_checks.js';
import { RefusedError, asError } from './errors.js';
import { HandlerQueue } from './handler_queue.js';
import { keepCursor } from './persisted_cursor.js';

/** @import { Message, Subscription, SubscribeOptions, StorageLike } from './types.js' */
/** @import { Subscriber } from './subscriber.js' */

/** Messages that may wait for an `async` handler. The log keeps the others. */
const DEFAULT_BUFFER = 1000;

/**
 * @typedef {object} Host
 * @property {(call: (subscriptions: import('./subscription_manager.js').SubscriptionManager) => void) => void} ask
 * @property {(error: unknown) => void} threw
 * @property {(error: Error) => void} reportError
 */

/** The target of the notifications of a subscriber. */
export class SubscriptionEntry {
  /** @type {Subscriber | undefined} */
  subscriber;
  /** Why it has ended. @type {Error | undefined} */
  failure;
  /** Whether the application uses `ready`. */
  observed = false;
  /** @type {Promise<Subscription>} */
  ready;
  /** @type {ReturnType<typeof keepCursor> | undefined} */
  persisted;

  #host;
  #handler;
  #options;
  #queue;
  /** @type {(value: Subscription) => void} */
  #started = () => {};
  /** @type {(error: Error) => void} */
  #failed = () => {};
  /** The position of the last handled message. @type {{cursor: number, epoch: string} | undefined} */
  #handled;
  #closed = false;
  #abort = () => void this.close();

  /**
   * @param {string} pattern @param {(message: Message) => unknown} handler
   * @param {SubscribeOptions & {buffer?: number | undefined}} options @param {StorageLike | undefined} storage @param {Host} host
   */
  constructor(pattern, handler, options, storage, host) {
    this.pattern = pattern;
    this.#handler = handler;
    this.#options = options;
    this.#host = host;
    this.#queue = new HandlerQueue({
      limit: options.buffer ?? DEFAULT_BUFFER,
      pause: () => this.#ask((subscriptions, subscriber) => subscriptions.pause(subscriber)),
      unpause: () => this.#ask((subscriptions, subscriber) => subscriptions.unpause(subscriber)),
      threw: host.threw,
      rejected: (error) => host.reportError(asError(error)),
    });
    this.ready = new Promise((resolve, reject) => {
      this.#started = resolve;
      this.#failed = reject;
    });
    // The application need not await it: errors go to `onEnd`, or to the event `error`.
    this.ready.catch(() => {});
    if (options.persist !== undefined) this.persisted = keepCursor(options.persist, storage, () => this.position);
    options.signal?.addEventListener('abort', this.#abort);
  }

  get place() {
    const { subscriber } = this;
    if (!this.#queue.idle || subscriber?.buffered) return this.#handled;
    return subscriber?.cursor === undefined ? undefined : { cursor: subscriber.cursor, epoch: subscriber.epoch ?? '' };
  }

  get position() {
    const { place } = this;
    return place && encodeCursor(place.cursor, place.epoch);
  }

  /** @returns {Promise<void>} */
  close() {
    return new Promise((resolve) => {
      if (this.#closed || !this.subscriber || this.subscriber.phase === 'ended') {
        this.#finish();
        return resolve();
      }
      this.#finish();
      this.#failed(this.#options.signal?.aborted ? this.#options.signal.reason : new RefusedError('closed', 'the subscription was closed'));
      this.#ask((subscriptions, subscriber) => subscriptions.remove(subscriber, () => resolve()));
    });
  }

  #finish() {
    if (!this.#closed) this.persisted?.close();
    this.#closed = true;
    this.#queue.clear();
    this.#options.signal?.removeEventListener('abort', this.#abort);
  }

  // Notifications

  started() {
    this.#started(subscriptionOf(this));
    this.persisted?.touch();
  }

  /** @param {{message: any, epoch: string}} what */
  message({ message, epoch }) {
    if (this.#closed) return;
    const made = asMessage(message, epoch);
    this.#queue.push(() => {
      const result = this.#handler(made);
      if (made.seq === undefined) return result;
      if (typeof (/** @type {any} */ (result)?.then) !== 'function') return this.#setHandled(made.seq, epoch);
      return Promise.resolve(result).finally(() => this.#setHandled(Number(made.seq), epoch));
    });
  }

  /** @param {import('./types.js').Gap} gap */
  gap(gap) {
    const { onGap } = this.#options;
    if (onGap && !this.#closed) this.#queue.push(() => onGap(gap));
    this.persisted?.touch();
  }

  live() {
    const { onLive } = this.#options;
    if (onLive && !this.#closed) this.#queue.push(() => onLive());
  }

  /** @param {Error | undefined} why */
  ended(why) {
    if (!why || this.#closed) return;
    this.failure = why;
    this.#failed(why);
    const { onEnd } = this.#options;
    const told = this.subscriber?.started || this.observed || onEnd;
    if (!told) this.#host.reportError(why);
    this.#queue.push(() => {
      this.#finish();
      return onEnd?.(why);
    });
  }

  /** @param {number} cursor @param {string} epoch */
  #setHandled(cursor, epoch) {
    this.#handled = { cursor, epoch };
    this.persisted?.touch();
  }

  /** @param {(subscriptions: import('./subscription_manager.js').SubscriptionManager, subscriber: Subscriber) => void} call */
  #ask(call) {
    const { subscriber } = this;
    if (subscriber) this.#host.ask((subscriptions) => call(subscriptions, subscriber));
  }
}

/** The subscription object, once the broker has accepted the subscription. @param {SubscriptionEntry} entry @returns {Subscription} */
function subscriptionOf(entry) {
  const close = () => entry.close();
  return {
    pattern: entry.pattern,
    get cursor() {
      return entry.place?.cursor;
    },
    get epoch() {
      return entry.place?.epoch;
    },
    get position() {
      return entry.position;
    },
    close,
    unsubscribe: close,
  };
}

/** The subscription object from the start. @param {SubscriptionEntry} entry @returns {import('./types.js').SubscriptionHandle} */
export function handleOf(entry) {
  return awaitable(subscriptionOf(entry), () => {
    entry.observed = true;
    return entry.ready;
  });
}

/**
 * An object that can be awaited: that waits until the broker has accepted it.
 *
 * @template {object} T @param {T} object @param {() => Promise<T>} ready @returns {import('./types.js').Awaitable<T>}
 */
export function awaitable(object, ready) {
  /** @type {any} */
  const handle = {
    __proto__: object,
    get ready() {
      return ready();
    },
    then: (/** @type {any} */ onFulfilled, /** @type {any} */ onRejected) => ready().then(onFulfilled, onRejected),
    catch: (/** @type {any} */ onRejected) => ready().catch(onRejected),
    finally: (/** @type {any} */ onFinally) => ready().finally(onFinally),
  };
  return handle;
}

/** @param {any} message @param {string} epoch @returns {Message} */
export function asMessage({ channel, payload, pattern, seq, at, sender, retain }, epoch) {
  const cursor = seq === undefined ? undefined : encodeCursor(seq, epoch);
  return { channel, payload, pattern, seq, at, sender, cursor, ...(retain && { retain }) };
}
