/**
 * Live maps: the state of the channels of a pattern, kept up to date. The maps of one pattern share one feed.
 *
 * @module
 */

import { checkFunction, checkText } from './argument_checks.js';

/** @typedef {import('./subscription_manager.js').SubscriptionManager} SubscriptionManager */
/** @typedef {import('./subscriber.js').Subscriber} Subscriber */
/** @typedef {NonNullable<Parameters<SubscriptionManager['add']>[3]>} FeedKind */
/** @typedef {{signal?: import('./types.js').AbortSignalLike | undefined, onEnd?: ((error: Error) => void) | undefined}} MapOptions */

/** The state of one pattern: the target of the notifications of its feed. Subclasses say what changes. */
export class LiveState {
  /** @type {Map<string, any>} */
  entries = new Map();
  /** Whether the first snapshot is complete. */
  complete = false;
  /** @type {Set<LiveMap>} */
  maps = new Set();
  /** @type {Subscriber | undefined} */
  feed;

  started() {}

  live() {}

  /** @param {any} message */
  message(message) {
    void message;
  }

  /** Replace the entries by those of a snapshot. @param {Map<string, any>} entries @param {any[]} changes what is different */
  replace(entries, changes) {
    this.entries = entries;
    this.complete = true;
    for (const map of [...this.maps]) map.fill();
    this.tell(changes);
  }

  /** @param {any[]} changes */
  tell(changes) {
    for (const change of changes) for (const map of [...this.maps]) map.tell(change);
  }

  /** @param {Error | undefined} why */
  ended(why) {
    if (why) for (const map of [...this.maps]) map.end(why);
  }
}

/** A map of the application. It reads like a `Map`. */
export class LiveMap {
  /** @type {Map<string, any>} */
  #entries;
  #options;
  #host;
  /** @type {Set<(change: any) => void>} */
  #listeners = new Set();
  /** Settle the call that opens it. @type {{resolve: (map: LiveMap) => void, reject: (error: Error) => void}} */
  #opening;
  #state;
  #open = true;
  #abort = () => {
    this.#opening.reject(this.#options.signal?.reason);
    this.close();
  };

  /**
   * @param {string} pattern @param {LiveState} state @param {MapOptions} options
   * @param {{resolve: (map: LiveMap) => void, reject: (error: Error) => void}} opening
   * @param {{release: () => Promise<void>, threw: (error: unknown) => void}} host
   */
  constructor(pattern, state, options, opening, host) {
    this.pattern = pattern;
    this.#state = state;
    this.#entries = state.entries;
    this.#options = options;
    this.#opening = opening;
    this.#host = host;
    options.signal?.addEventListener('abort', this.#abort);
    state.maps.add(this);
    if (state.complete) opening.resolve(this);
  }

  get size() {
    return this.#entries.size;
  }

  /** @param {string} channel */
  get(channel) {
    return this.#entries.get(channel);
  }

  /** @param {string} channel */
  has(channel) {
    return this.#entries.has(channel);
  }

  keys() {
    return this.#entries.keys();
  }

  values() {
    return this.#entries.values();
  }

  entries() {
    return this.#entries.entries();
  }

  [Symbol.iterator]() {
    return this.#entries.entries();
  }

  /** @param {(value: any, channel: string, map: any) => void} use */
  forEach(use) {
    for (const [channel, value] of this.#entries) use(value, channel, this);
  }

  /** Call a listener for each change. Returns a function that removes it. @param {(change: any) => void} listener */
  onChange(listener) {
    checkFunction('listener', listener ?? null);
    const own = (/** @type {any} */ change) => listener(change);
    this.#listeners.add(own);
    return () => void this.#listeners.delete(own);
  }

  /** End it. It keeps what it shows. @returns {Promise<void>} */
  async close() {
    if (!this.#open) return;
    this.#finish();
    await this.#host.release();
  }

  // Notifications of the state

  /** The state is complete, for the first time or again. */
  fill() {
    this.#entries = this.#state.entries;
    this.#opening.resolve(this);
  }

  /** @param {any} change */
  tell(change) {
    for (const listener of this.#open ? [...this.#listeners] : []) this.#call(() => listener(change));
  }

  /** @param {Error} why */
  end(why) {
    this.#finish();
    const { onEnd } = this.#options;
    this.#opening.reject(why);
    if (onEnd) this.#call(() => onEnd(why));
    void this.#host.release();
  }

  #finish() {
    this.#open = false;
    this.#entries = new Map(this.#entries);
    this.#state.maps.delete(this);
    this.#options.signal?.removeEventListener('abort', this.#abort);
  }

  /** @param {() => void} call */
  #call(call) {
    try {
      call();
    } catch (error) {
      this.#host.threw(error);
    }
  }
}

/** The live maps of one kind of a client. The first map of a pattern subscribes, and the last one ends that. */
export class LiveMaps {
  #State;
  #Feed;
  #host;
  /** @type {Map<string, LiveState>} */
  #states = new Map();

  /**
   * @param {new () => LiveState} State @param {FeedKind} Feed
   * @param {{perform: (call: (subscriptions: SubscriptionManager) => void) => void, threw: (error: unknown) => void}} host
   */
  constructor(State, Feed, host) {
    this.#State = State;
    this.#Feed = Feed;
    this.#host = host;
  }

  /** Open a map. Resolves when it is complete. @param {string} pattern @param {MapOptions} options @returns {Promise<any>} */
  open(pattern, options) {
    return new Promise((resolve, reject) => {
      checkText('pattern', pattern);
      checkFunction('onEnd', options.onEnd);
      if (options.signal?.aborted) throw options.signal.reason;
      let state = this.#states.get(pattern);
      const first = !state || state.feed?.phase === 'ended';
      if (!state || first) this.#states.set(pattern, (state = new this.#State()));
      const shared = state;
      new LiveMap(pattern, state, options, { resolve, reject }, { release: () => this.#release(pattern, shared), threw: this.#host.threw });
      if (first) this.#host.perform((subscriptions) => void (shared.feed = subscriptions.add(pattern, {}, shared, this.#Feed)));
    });
  }

  /** The state that the maps of a pattern show. @param {string} pattern */
  stateOf(pattern) {
    return this.#states.get(pattern);
  }

  /** End the feed of a state that no map shows any more. @param {string} pattern @param {LiveState} state @returns {Promise<void>} */
  #release(pattern, state) {
    return new Promise((resolve) => {
      const { feed, maps } = state;
      if (!feed || maps.size) return resolve();
      if (this.#states.get(pattern) === state) this.#states.delete(pattern);
      this.#host.perform((subscriptions) => subscriptions.remove(feed, () => resolve()));
    });
  }
}
