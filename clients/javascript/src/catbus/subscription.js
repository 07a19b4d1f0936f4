/**
 * A subscription at the edge: what the application has of it, and its handler's queue.
 *
 * @module
 */

import { encodeCursor } from './arguments.js';
import { RefusedError, asError } from './errors.js';
import { Inbox } from './inbox.js';
import { keepCursor } from './persist.js';

/** @import { Message, Subscription, SubscribeOptions, StorageLike } from './types.js' */
/** @import { Reader } from './readers.js' */

/** How many messages may wait for an `async` handler; the log keeps the others. */
const BUFFER = 1000;

/**
 * @typedef {object} Host
 * @property {(call: (subscriptions: import('./subscriptions.js').Subscriptions) => void) => void} ask
 * @property {(error: unknown) => void} threw
 * @property {(error: Error) => void} complain
 */

/** What effects about a reader are for. */
export class Entry {
  /** @type {Reader | undefined} */
  reader;
  /** Why it has ended. @type {Error | undefined} */
  failure;
  /** Whether anybody looks at `ready`. */
  observed = false;
  /** @type {Promise<Subscription>} */
  ready;
  /** @type {ReturnType<typeof keepCursor> | undefined} */
  persisted;

  #host;
  #handler;
  #options;
  #inbox;
  /** @type {(value: Subscription) => void} */
  #begun = () => {};
  /** @type {(error: Error) => void} */
  #failed = () => {};
  /** Where the last message that was handled stands. @type {{cursor: number, epoch: string} | undefined} */
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
    this.#inbox = new Inbox({
      limit: options.buffer ?? BUFFER,
      pause: () => this.#ask((subscriptions, reader) => subscriptions.pause(reader)),
      goOn: () => this.#ask((subscriptions, reader) => subscriptions.goOn(reader)),
      threw: host.threw,
      rejected: (error) => host.complain(asError(error)),
    });
    this.ready = new Promise((resolve, reject) => {
      this.#begun = resolve;
      this.#failed = reject;
    });
    // Nobody has to wait for it: what goes wrong is told to `onEnd`, or as an `error`.
    this.ready.catch(() => {});
    if (options.persist !== undefined) this.persisted = keepCursor(options.persist, storage, () => this.position);
    options.signal?.addEventListener('abort', this.#abort);
  }

  get place() {
    const { reader } = this;
    if (!this.#inbox.idle || reader?.held) return this.#handled;
    return reader?.cursor === undefined ? undefined : { cursor: reader.cursor, epoch: reader.epoch ?? '' };
  }

  get position() {
    const { place } = this;
    return place && encodeCursor(place.cursor, place.epoch);
  }

  /** @returns {Promise<void>} */
  close() {
    return new Promise((resolve) => {
      if (this.#closed || !this.reader || this.reader.phase === 'ended') {
        this.#finish();
        return resolve();
      }
      this.#finish();
      this.#failed(this.#options.signal?.aborted ? this.#options.signal.reason : new RefusedError('closed', 'the subscription was closed'));
      this.#ask((subscriptions, reader) => subscriptions.remove(reader, () => resolve()));
    });
  }

  #finish() {
    if (!this.#closed) this.persisted?.close();
    this.#closed = true;
    this.#inbox.clear();
    this.#options.signal?.removeEventListener('abort', this.#abort);
  }

  // Effects

  begun() {
    this.#begun(agreed(this));
    this.persisted?.touch();
  }

  /** @param {{message: any, epoch: string}} what */
  message({ message, epoch }) {
    if (this.#closed) return;
    const made = asMessage(message, epoch);
    this.#inbox.push(() => {
      const result = this.#handler(made);
      if (made.seq === undefined) return result;
      if (typeof (/** @type {any} */ (result)?.then) !== 'function') return this.#handledUpTo(made.seq, epoch);
      return Promise.resolve(result).finally(() => this.#handledUpTo(Number(made.seq), epoch));
    });
  }

  /** @param {import('./types.js').Gap} gap */
  gap(gap) {
    const { onGap } = this.#options;
    if (onGap && !this.#closed) this.#inbox.push(() => onGap(gap));
    this.persisted?.touch();
  }

  live() {
    const { onLive } = this.#options;
    if (onLive && !this.#closed) this.#inbox.push(() => onLive());
  }

  /** @param {Error | undefined} why */
  ended(why) {
    if (!why || this.#closed) return;
    this.failure = why;
    this.#failed(why);
    const { onEnd } = this.#options;
    const told = this.reader?.begun || this.observed || onEnd;
    if (!told) this.#host.complain(why);
    this.#inbox.push(() => {
      this.#finish();
      return onEnd?.(why);
    });
  }

  /** @param {number} cursor @param {string} epoch */
  #handledUpTo(cursor, epoch) {
    this.#handled = { cursor, epoch };
    this.persisted?.touch();
  }

  /** @param {(subscriptions: import('./subscriptions.js').Subscriptions, reader: Reader) => void} call */
  #ask(call) {
    const { reader } = this;
    if (reader) this.#host.ask((subscriptions) => call(subscriptions, reader));
  }
}

/** What the application has of a subscription that the broker has agreed to. @param {Entry} entry @returns {Subscription} */
function agreed(entry) {
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

/** What it has from the moment it asks for it; awaiting it waits until the broker has agreed. @param {Entry} entry */
export function handleOf(entry) {
  const ready = () => {
    entry.observed = true;
    return entry.ready;
  };
  /** @type {PromiseLike<Subscription> & Record<string, any>} */
  const handle = {
    __proto__: agreed(entry),
    get ready() {
      return ready();
    },
    then: (onFulfilled, onRejected) => ready().then(onFulfilled, onRejected),
    catch: (/** @type {any} */ onRejected) => ready().catch(onRejected),
    finally: (/** @type {any} */ onFinally) => ready().finally(onFinally),
  };
  return /** @type {import('./types.js').SubscriptionHandle} */ (handle);
}

/** @param {any} message @param {string} epoch @returns {Message} */
export function asMessage({ channel, payload, pattern, seq, at, sender }, epoch) {
  return { channel, payload, pattern, seq, at, sender, cursor: seq === undefined ? undefined : encodeCursor(seq, epoch) };
}
