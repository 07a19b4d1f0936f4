/**
 * The table of requests for pages, and of pings, without a reply. It outlives connections: the next one gets them again.
 *
 * @module
 */

import { RefusedError } from './errors.js';
import { REPLY_TIMEOUT } from './in_flight_publishes.js';

/** @typedef {import('./connection.js').Connection} Connection */
/** @typedef {import('./core.js').Settler} Settler */

export class InFlightRequests {
  #host;
  /** @type {Connection | undefined} */
  #connection;
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
    this.#send(id, { type: 'history', pattern, limit, before, id }, done, kept);
  }

  /** @param {string} pattern @param {number | undefined} limit @param {string | undefined} after @param {Settler} done */
  members(pattern, limit, after, done) {
    const id = this.#host.nextId();
    this.#send(id, { type: 'members', pattern, limit, after, id }, done);
  }

  /** @param {Settler} done called with the round-trip time in milliseconds */
  ping(done) {
    const seq = this.#host.nextId();
    this.#send(seq, { type: 'ping', seq }, done);
  }

  /** @param {Connection} connection */
  resume(connection) {
    this.#connection = connection;
    for (const request of this.#open.values()) {
      request.at = this.#host.timers.now;
      connection.send(request.message);
    }
  }

  /** @param {Connection} connection */
  lose(connection) {
    if (this.#connection === connection) this.#connection = undefined;
  }

  /** @param {Error} why */
  fail(why) {
    for (const [id, { kept }] of [...this.#open]) if (!kept) this.answered(id, why);
  }

  /** @param {number} id @param {Error | undefined} error @param {any} [answer] @returns {boolean} whether the request is one of these */
  answered(id, error, answer) {
    const request = this.#open.get(id);
    if (!request) return false;
    this.#open.delete(id);
    request.done(error, answer?.type === 'pong' ? this.#host.timers.now - request.at : answer);
    return true;
  }

  /** As in `InFlightPublishes`. @param {number} moment */
  timeOutBefore(moment) {
    for (const [id, { at }] of [...this.#open]) {
      if (at < moment - REPLY_TIMEOUT) this.answered(id, new RefusedError('unavailable', 'the broker does not answer'));
    }
  }

  /** @param {number} id @param {any} message @param {Settler} done @param {boolean} [kept] */
  #send(id, message, done, kept = false) {
    this.#open.set(id, { message, done, at: this.#host.timers.now, kept });
    this.#connection?.send(message);
  }
}
