/**
 * The queue of a handler: one call after another, also if the handler is `async`.
 *
 * @module
 */

/**
 * @typedef {object} Host
 * @property {number} limit waiting calls at which the subscription is paused
 * @property {() => void} pause
 * @property {() => void} unpause
 * @property {(error: unknown) => void} threw
 * @property {(error: unknown) => void} rejected
 */

export class HandlerQueue {
  #host;
  /** @type {(() => unknown)[]} */
  #queue = [];
  #busy = false;
  #paused = false;

  /** @param {Host} host */
  constructor(host) {
    this.#host = host;
  }

  /** Whether everything was handled. */
  get idle() {
    return !this.#busy && !this.#queue.length;
  }

  /** @param {() => unknown} call */
  push(call) {
    if (this.idle) return this.#run(call);
    this.#queue.push(call);
    if (!this.#paused && this.#queue.length >= this.#host.limit) {
      this.#paused = true;
      this.#host.pause();
    }
  }

  /** Drop the waiting calls. */
  clear() {
    this.#queue = [];
  }

  /** @param {() => unknown} call */
  #run(call) {
    let result;
    try {
      result = call();
    } catch (error) {
      this.#host.threw(error);
    }
    if (typeof (/** @type {any} */ (result)?.then) !== 'function') return;
    this.#busy = true;
    Promise.resolve(result)
      .catch((error) => this.#host.rejected(error))
      .then(() => this.#next());
  }

  #next() {
    this.#busy = false;
    while (!this.#busy) {
      const call = this.#queue.shift();
      if (!call) break;
      this.#run(call);
    }
    if (!this.#paused || this.#queue.length > this.#host.limit / 2) return;
    this.#paused = false;
    this.#host.unpause();
  }
}
