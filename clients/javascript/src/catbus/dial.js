/**
 * One try to get a connection by any of several ways: the first alone, and after a head start, or when it has failed, the
 * next one beside it. The first to be authenticated wins, and the others are given up. A refusal counts for all.
 *
 * @module
 */

import { DisconnectedError, RefusedError } from './errors.js';

/** @typedef {import('./link.js').Link} Link */

/**
 * @typedef {object} Host
 * @property {import('./timers.js').Timers} timers
 * @property {(route: any) => Link} open begin with a way
 * @property {(link: Link) => void} close
 * @property {(link: Link) => void} won
 * @property {(why: Error) => void} failed every way has failed
 */

export class Dial {
  #host;
  #routes;
  #headStart;
  #timeout;
  /** Those that may still win. @type {Set<Link>} */
  #links = new Set();
  #begun = 0;
  #over = false;
  #name;

  /** @param {number} id @param {{url: string}[]} routes @param {{headStart: number, connectTimeout: number}} options @param {Host} host */
  constructor(id, routes, { headStart, connectTimeout }, host) {
    this.#name = `head start ${id}`;
    this.#routes = routes;
    this.#headStart = headStart;
    this.#timeout = connectTimeout;
    this.#host = host;
  }

  /** Try the next way. */
  begin() {
    if (this.#over) return;
    if (this.#begun === this.#routes.length) return;
    const route = this.#routes[this.#begun++];
    const link = this.#host.open(route);
    this.#links.add(link);
    const { timers } = this.#host;
    timers.set(`connect ${link.id}`, this.#timeout, () => this.failed(link, new DisconnectedError(`no answer from ${route.url}`)));
    if (this.#begun < this.#routes.length) timers.set(this.#name, this.#headStart, () => this.begin());
  }

  /** @param {Link} link */
  has(link) {
    return this.#links.has(link);
  }

  /** A way is authenticated. @param {Link} link */
  won(link) {
    this.#drop(link);
    this.#end();
    this.#host.won(link);
  }

  /** A way leads nowhere. @param {Link} link @param {Error} why */
  failed(link, why) {
    if (!this.#links.has(link)) return;
    this.#drop(link);
    this.#host.close(link);
    if (why instanceof RefusedError) {
      this.#end();
      this.#host.failed(why);
    } else if (this.#begun < this.#routes.length) {
      this.begin();
    } else if (!this.#links.size) {
      this.#end();
      this.#host.failed(why);
    }
  }

  /** Give all of them up. */
  abort() {
    this.#end();
  }

  /** @param {Link} link */
  #drop(link) {
    this.#links.delete(link);
    this.#host.timers.cancel(`connect ${link.id}`);
  }

  #end() {
    this.#over = true;
    this.#host.timers.cancel(this.#name);
    for (const link of [...this.#links]) {
      this.#drop(link);
      this.#host.close(link);
    }
  }
}
