/**
 * A subscription at the edge: what the application has of it, and its handler's queue.
 *
 * @module
 */

import { encodeCursor } from './arguments.js';
import { RefusedError } from './errors.js';
import { Inbox } from './inbox.js';
import { Persisted } from './persist.js';

/** @import { Message, SubscribeOptions, StorageLike } from './types.js' */
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
  /** @type {Promise<PlainSubscription>} */
  ready;
  /** @type {Persisted | undefined} */
  persisted;

  #host;
  #handler;
  #options;
  #inbox;
  /** @type {(value: PlainSubscription) => void} */
  #begun = () => {};
  /** @type {(error: Error) => void} */
  #failed = () => {};
  /** Where the last message that was handled stands. @type {{cursor: number, epoch: string} | undefined} */
  #handled;
  #closed = false;
  #abort = () => void this.close();

  /**
   * @param {string} pattern @param {(message: Message) => unknown} handler
   * @param {SubscribeOptions & {buffer?: number}} options @param {StorageLike | undefined} storage @param {Host} host
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
      rejected: (error) => host.complain(error instanceof Error ? error : new Error(`${error}`)),
    });
    this.ready = new Promise((resolve, reject) => {
      this.#begun = resolve;
      this.#failed = reject;
    });
    // Nobody has to wait for it: what goes wrong is told to `onEnd`, or as an `error`.
    this.ready.catch(() => {});
    if (options.persist !== undefined) this.persisted = new Persisted(options.persist, storage, () => this.position);
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
      const settler = { resolve: () => resolve(), reject: () => resolve() };
      this.#ask((subscriptions, reader) => subscriptions.remove(reader, settler));
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
    this.#begun(new PlainSubscription(this));
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

/** A subscription that the broker has agreed to. */
export class PlainSubscription {
  #entry;

  /** @param {Entry} entry */
  constructor(entry) {
    this.#entry = entry;
  }

  get pattern() {
    return this.#entry.pattern;
  }

  /** The seq up to which everything was handled. @returns {number | undefined} */
  get cursor() {
    return this.#entry.place?.cursor;
  }

  /** @returns {string | undefined} */
  get epoch() {
    return this.#entry.place?.epoch;
  }

  /** @returns {string | undefined} */
  get position() {
    return this.#entry.position;
  }

  /** @returns {Promise<void>} */
  close() {
    return this.#entry.close();
  }

  /** @returns {Promise<void>} */
  unsubscribe() {
    return this.#entry.close();
  }
}

/** A subscription from the moment it is asked for; awaiting it waits until the broker has agreed. */
export class Handle extends PlainSubscription {
  #entry;

  /** @param {Entry} entry */
  constructor(entry) {
    super(entry);
    this.#entry = entry;
  }

  /** @returns {Promise<import('./types.js').Subscription>} */
  get ready() {
    this.#entry.observed = true;
    return this.#entry.ready;
  }

  /** @type {PromiseLike<import('./types.js').Subscription>['then']} */
  then(onFulfilled, onRejected) {
    return this.ready.then(onFulfilled, onRejected);
  }

  /** @type {Promise<import('./types.js').Subscription>['catch']} */
  catch(onRejected) {
    return this.ready.catch(onRejected);
  }

  /** @type {Promise<import('./types.js').Subscription>['finally']} */
  finally(onFinally) {
    return this.ready.finally(onFinally);
  }
}

/** @param {any} message @param {string} epoch @returns {Message} */
export function asMessage({ channel, payload, pattern, seq, at, sender }, epoch) {
  return { channel, payload, pattern, seq, at, sender, cursor: seq === undefined ? undefined : encodeCursor(seq, epoch) };
}
