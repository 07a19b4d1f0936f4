/**
 * Histories and pings that have no answer yet. They outlive connections: the next one is asked again.
 *
 * @module
 */

import { RefusedError } from './errors.js';
import { STUCK } from './publishes.js';

/** @typedef {import('./link.js').Link} Link */
/** @typedef {import('./core.js').Settler} Settler */

export class Requests {
  #host;
  /** @type {Link | undefined} */
  #desk;
  /** @type {Map<number, {message: any, done: Settler, at: number, kept: boolean}>} */
  #open = new Map();

  /** @param {{timers: import('./timers.js').Timers, nextId: () => number}} host */
  constructor(host) {
    this.#host = host;
  }

  /**
   * @param {string} pattern @param {number | undefined} limit @param {number | undefined} before @param {Settler} done
   * @param {boolean} [kept] whether it waits for a connection also while the application wants none
   */
  history(pattern, limit, before, done, kept = false) {
    const id = this.#host.nextId();
    this.#ask(id, { type: 'history', pattern, limit, before, id }, done, kept);
  }

  /** @param {Settler} done told how many milliseconds it took */
  ping(done) {
    const seq = this.#host.nextId();
    this.#ask(seq, { type: 'ping', seq }, done);
  }

  /** @param {Link} desk */
  resume(desk) {
    this.#desk = desk;
    for (const request of this.#open.values()) {
      request.at = this.#host.timers.now;
      desk.send(request.message);
    }
  }

  /** @param {Link} desk */
  lose(desk) {
    if (this.#desk === desk) this.#desk = undefined;
  }

  /** @param {Error} why */
  fail(why) {
    for (const [id, { kept }] of [...this.#open]) if (!kept) this.answered(id, why);
  }

  /** @param {number} id @param {Error | undefined} error @param {any} [answer] @returns {boolean} whether it was one of these */
  answered(id, error, answer) {
    const request = this.#open.get(id);
    if (!request) return false;
    this.#open.delete(id);
    request.done(error, answer?.type === 'pong' ? this.#host.timers.now - request.at : answer);
    return true;
  }

  /** As in `Publishes`. @param {number} moment */
  giveUpBefore(moment) {
    for (const [id, { at }] of [...this.#open]) {
      if (at < moment - STUCK) this.answered(id, new RefusedError('unavailable', 'the broker does not answer'));
    }
  }

  /** @param {number} id @param {any} message @param {Settler} done @param {boolean} [kept] */
  #ask(id, message, done, kept = false) {
    this.#open.set(id, { message, done, at: this.#host.timers.now, kept });
    this.#desk?.send(message);
  }
}
