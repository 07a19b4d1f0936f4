/**
 * What keeps a connection: pings, and the next token before the present one expires.
 *
 * @module
 */

import { DisconnectedError } from './errors.js';
import { renewalFloor, untilRefresh } from './tokens.js';

/** @typedef {import('./link.js').Link} Link */

/** How long a connection has to answer a check after the network has changed or the page was asleep: milliseconds. */
const CHECK = 2500;
/** A timer that is later than this says that the page was asleep. */
const ASLEEP = 1000;
/** How long to wait after a renewal has failed, doubled each time. */
const RENEW_AGAIN = 5000;
const LONGEST_RENEW = 60_000;

/**
 * @typedef {object} Host
 * @property {import('./timers.js').Timers} timers
 * @property {() => number} nextId
 * @property {(event: string, value: any) => void} emit
 * @property {(...effect: import('./core.js').Effect) => void} effect
 * @property {(link: Link, why: DisconnectedError, code: number) => void} lose
 */

export class Upkeep {
  #host;
  #options;

  /** @param {{pingInterval: number, pingTimeout: number, renewable: boolean}} options @param {Host} host */
  constructor(options, host) {
    this.#options = options;
    this.#host = host;
  }

  /** A connection has ended. @param {Link} link */
  stop(link) {
    for (const name of ['ping', 'pong', 'check', 'renew']) this.#host.timers.cancel(`${name} ${link.id}`);
  }

  /** @param {Link} link */
  keepAlive(link) {
    const { pingInterval, pingTimeout } = this.#options;
    this.#host.timers.set(`ping ${link.id}`, pingInterval, () => {
      this.#check(link, 'pong', pingTimeout);
      this.keepAlive(link);
    });
  }

  /** The network has changed, or the page was asleep: see at once whether the connection lives. @param {Link} link */
  wake(link) {
    this.#check(link, 'check', CHECK);
  }

  /**
   * Ping it, and give it up when nothing is heard for so long. One check of each name at a time, or they would put off
   * each other's end.
   *
   * @param {Link} link @param {string} name @param {number} patience
   */
  #check(link, name, patience) {
    const { timers } = this.#host;
    if (timers.has(`${name} ${link.id}`)) return;
    const asked = timers.now;
    const seq = this.#host.nextId();
    link.pings.set(seq, asked);
    link.send({ type: 'ping', seq });
    timers.set(`${name} ${link.id}`, patience, (late) => {
      if (!link.pings.has(seq) || link.heard > asked) return;
      // A page that was asleep may have the answer and not have read it.
      if (late > ASLEEP) this.#check(link, name, CHECK);
      else this.#host.lose(link, new DisconnectedError('the broker does not answer'), 4000);
    });
  }

  /** Bring the next token before the time of this one is over. @param {Link} link @param {number} wall */
  renewLater(link, wall) {
    const delay = untilRefresh(link.token, wall);
    if (!this.#options.renewable || delay === undefined) return;
    const floor = renewalFloor(link.early);
    link.early = delay <= floor ? link.early + 1 : 0;
    this.#host.timers.set(`renew ${link.id}`, Math.max(delay, floor), () => this.#host.effect('token', link));
  }

  /** @param {Link} link @param {Error} why */
  renewAgain(link, why) {
    this.#host.emit('error', why);
    const delay = Math.min(LONGEST_RENEW, RENEW_AGAIN * 2 ** Math.min(link.early++, 10));
    this.#host.timers.set(`renew ${link.id}`, delay, () => this.#host.effect('token', link));
  }
}
