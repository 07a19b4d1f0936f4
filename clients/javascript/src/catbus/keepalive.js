/**
 * Keepalive of a connection: pings, and the next token before the present one expires.
 *
 * @module
 */

import { DisconnectedError } from './errors.js';
import { minRenewalDelay, renewalDelay } from './token_renewal.js';

/** @typedef {import('./connection.js').Connection} Connection */

/** Milliseconds for the reply to a check after the network has changed or the page was asleep. */
const CHECK_TIMEOUT = 2500;
/** A timer that is later than this, in milliseconds, shows that the page was asleep. */
const SLEEP_THRESHOLD = 1000;
/** The pause after a failed renewal, in milliseconds. It doubles each time. */
const RENEWAL_RETRY_DELAY = 5000;
const MAX_RENEWAL_RETRY_DELAY = 60_000;

/**
 * @typedef {object} Host
 * @property {import('./timers.js').Timers} timers
 * @property {() => number} nextId
 * @property {(event: string, value: any) => void} emit
 * @property {(...effect: import('./core.js').Effect) => void} effect
 * @property {(connection: Connection, why: DisconnectedError, code: number) => void} lose
 */

export class Keepalive {
  #host;
  #options;

  /** @param {{pingInterval: number, pingTimeout: number, renewable: boolean}} options @param {Host} host */
  constructor(options, host) {
    this.#options = options;
    this.#host = host;
  }

  /** A connection has ended. @param {Connection} connection */
  stop(connection) {
    for (const name of ['ping', 'pong', 'check', 'renew']) this.#host.timers.cancel(`${name} ${connection.id}`);
  }

  /** @param {Connection} connection */
  startPings(connection) {
    const { pingInterval, pingTimeout } = this.#options;
    this.#host.timers.set(`ping ${connection.id}`, pingInterval, () => {
      this.#check(connection, 'pong', pingTimeout);
      this.startPings(connection);
    });
  }

  /** Check the connection at once: the network has changed, or the page was asleep. @param {Connection} connection */
  wake(connection) {
    this.#check(connection, 'check', CHECK_TIMEOUT);
  }

  /**
   * Send a ping, and close the connection if nothing arrives in time. One check of each name at a time, or they would delay
   * each other's end.
   *
   * @param {Connection} connection @param {string} name @param {number} patience
   */
  #check(connection, name, patience) {
    const { timers } = this.#host;
    if (timers.has(`${name} ${connection.id}`)) return;
    const asked = timers.now;
    const seq = this.#host.nextId();
    connection.pings.set(seq, asked);
    connection.send({ type: 'ping', seq });
    timers.set(`${name} ${connection.id}`, patience, (late) => {
      if (!connection.pings.has(seq) || connection.heard > asked) return;
      // A page that was asleep may have received the reply without reading it.
      if (late > SLEEP_THRESHOLD) this.#check(connection, name, CHECK_TIMEOUT);
      else this.#host.lose(connection, new DisconnectedError('the broker does not answer'), 4000);
    });
  }

  /** Schedule the next token before this one expires. @param {Connection} connection @param {number} wall */
  scheduleRenewal(connection, wall) {
    const delay = renewalDelay(connection.token, wall);
    if (!this.#options.renewable || delay === undefined) return;
    const floor = minRenewalDelay(connection.early);
    connection.early = delay <= floor ? connection.early + 1 : 0;
    this.#host.timers.set(`renew ${connection.id}`, Math.max(delay, floor), () => this.#host.effect('token', connection));
  }

  /** @param {Connection} connection @param {Error} why */
  retryRenewal(connection, why) {
    this.#host.emit('error', why);
    const delay = Math.min(MAX_RENEWAL_RETRY_DELAY, RENEWAL_RETRY_DELAY * 2 ** Math.min(connection.early++, 10));
    this.#host.timers.set(`renew ${connection.id}`, delay, () => this.#host.effect('token', connection));
  }
}
