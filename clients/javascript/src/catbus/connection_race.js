/**
 * A race between the addresses of a broker: the first one alone, and after a head start, or when it has failed, the
 * next one beside it. The first to authenticate wins, and the others are closed. A rejected token ends the race.
 *
 * @module
 */

import { DisconnectedError, RefusedError } from './errors.js';

/** @typedef {import('./connection.js').Connection} Connection */

/**
 * @typedef {object} Host
 * @property {import('./timers.js').Timers} timers
 * @property {(route: any) => Connection} open open a connection
 * @property {(connection: Connection) => void} close
 * @property {(connection: Connection) => void} won
 * @property {(why: Error) => void} failed every attempt has failed
 */

export class ConnectionRace {
  #host;
  #routes;
  #headStart;
  #timeout;
  /** The connections that may still win. @type {Set<Connection>} */
  #candidates = new Set();
  #started = 0;
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

  /** Start the next attempt. */
  begin() {
    if (this.#over) return;
    if (this.#started === this.#routes.length) return;
    const route = this.#routes[this.#started++];
    const connection = this.#host.open(route);
    this.#candidates.add(connection);
    const { timers } = this.#host;
    timers.set(`connect ${connection.id}`, this.#timeout, () => this.failed(connection, new DisconnectedError(`no answer from ${route.url}`)));
    if (this.#started < this.#routes.length) timers.set(this.#name, this.#headStart, () => this.begin());
  }

  /** @param {Connection} connection */
  has(connection) {
    return this.#candidates.has(connection);
  }

  /** A connection has authenticated. @param {Connection} connection */
  won(connection) {
    this.#remove(connection);
    this.#end();
    this.#host.won(connection);
  }

  /** An attempt has failed. @param {Connection} connection @param {Error} why */
  failed(connection, why) {
    if (!this.#candidates.has(connection)) return;
    this.#remove(connection);
    this.#host.close(connection);
    if (why instanceof RefusedError) {
      this.#end();
      this.#host.failed(why);
    } else if (this.#started < this.#routes.length) {
      this.begin();
    } else if (!this.#candidates.size) {
      this.#end();
      this.#host.failed(why);
    }
  }

  /** Close all attempts. */
  abort() {
    this.#end();
  }

  /** @param {Connection} connection */
  #remove(connection) {
    this.#candidates.delete(connection);
    this.#host.timers.cancel(`connect ${connection.id}`);
  }

  #end() {
    this.#over = true;
    this.#host.timers.cancel(this.#name);
    for (const connection of [...this.#candidates]) {
      this.#remove(connection);
      this.#host.close(connection);
    }
  }
}
