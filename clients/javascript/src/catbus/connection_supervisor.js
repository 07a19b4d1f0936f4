/**
 * The supervisor of the connections of one client: the present one, and the next one during a move.
 *
 * @module
 */

import { ConnectionRace } from './connection_race.js';
import { DisconnectedError, RefusedError, isFinal } from './errors.js';
import { Connection } from './connection.js';
import { TRANSITIONS } from './connection_states.js';
import { Keepalive } from './keepalive.js';

/** @typedef {import('./core.js').CoreOptions} CoreOptions */
/** @typedef {import('./broker_addresses.js').Kind} Kind */
/** @typedef {import('./connection_states.js').ConnectionState} ConnectionState */

/** The longest `retry_after` of a token that is not valid yet, in milliseconds. */
const MAX_RETRY_AFTER = 300_000;
/** Milliseconds that the old connection has for its replies to publishes before a move. */
const ACKNOWLEDGEMENT_TIMEOUT = 2000;
/** The least time between attempts after events of the network, in milliseconds. */
const MIN_ATTEMPT_INTERVAL = 1000;

/**
 * @typedef {import('./keepalive.js').Host & More} Host
 *
 * @typedef {object} More
 * @property {import('./in_flight_publishes.js').InFlightPublishes} publishes
 * @property {import('./in_flight_requests.js').InFlightRequests} requests
 * @property {import('./subscription_manager.js').SubscriptionManager} subscriptions
 * @property {import('./memberships.js').Memberships} memberships
 * @property {(error?: Error) => void} arrived there is a connection, or there will be none
 */

export class ConnectionSupervisor {
  /** @type {ConnectionState} */
  state = 'disconnected';
  /** The present connection. @type {Connection | undefined} */
  present;
  /** The connection that replaces it, during a move. @type {Connection | undefined} */
  next;
  running = false;
  /** Why it is not connected. @type {Error | undefined} */
  last;
  /** The client_id of the last session. @type {string | null | undefined} */
  identity;
  /** The producer id of this client. @type {string | undefined} */
  producer;

  #host;
  #options;
  #keepalive;
  /** @type {ConnectionRace | undefined} */
  #race;
  /** The purpose of the race, while there is a connection. @type {'upgrade' | 'leave' | undefined} */
  #moving;
  #repliesTimedOut = false;
  #subscribesTimedOut = false;
  #tries = 0;
  #connectedAt = 0;
  #attemptedAt = -Infinity;

  /** @param {CoreOptions} options @param {Host} host */
  constructor(options, host) {
    this.#options = options;
    this.#host = host;
    this.#keepalive = new Keepalive(options, host);
  }

  start() {
    if (this.running) return;
    this.running = true;
    this.#tries = 0;
    this.#transition('connect()');
    this.#connectNow();
  }

  /** Make no further connection for now. @param {Error} why @param {'disconnect()' | 'final error'} event */
  stop(why, event) {
    if (!this.running) return;
    const { timers, publishes, requests, subscriptions, memberships } = this.#host;
    this.last = why;
    this.running = false;
    this.identity = undefined;
    this.#race?.abort();
    this.#race = this.#moving = undefined;
    for (const connection of [this.present, this.next]) {
      if (!connection) continue;
      this.#close(connection, 0);
      this.#detach(connection, why);
    }
    this.next = undefined;
    for (const name of ['reconnect', 'move', 'upgrade', 'replies', 'asks']) timers.cancel(name);
    publishes.fail(why);
    requests.fail(why);
    if (event === 'final error') for (const each of [subscriptions, memberships]) each.endAll(why);
    this.#transition(event);
    this.#host.arrived(why);
  }

  /** Check the connection at once, or try to get one: the network is back, or the page is visible again. */
  wake() {
    const { timers } = this.#host;
    if (this.present) this.#keepalive.wake(this.present);
    else if (timers.has('reconnect') && timers.now - this.#attemptedAt >= MIN_ATTEMPT_INTERVAL) {
      timers.cancel('reconnect');
      this.#connectNow();
    }
  }

  // Events of connections

  /** The transport of a connection is open. @param {Connection} connection */
  opened(connection) {
    if (connection.phase !== 'opening') return;
    connection.phase = 'token';
    if (!this.present) this.#transition('transport open');
    this.#host.effect('token', connection);
  }

  /** An attempt has failed. @param {Connection} connection @param {Error} why */
  failed(connection, why) {
    this.#race?.failed(connection, why);
  }

  /** There is no token. After a `RefusedError` there will be none. @param {Connection} connection @param {Error} why */
  noToken(connection, why) {
    if (connection.phase === 'ended') return;
    if (why instanceof RefusedError) this.stop(why, 'final error');
    else if (connection.phase === 'open') this.#keepalive.retryRenewal(connection, why);
    else this.failed(connection, why);
  }

  /** @param {Connection} connection @param {number} wall milliseconds since 1970 */
  authenticated(connection, wall) {
    this.#keepalive.scheduleRenewal(connection, wall);
    if (connection.phase !== 'authenticating') return;
    connection.phase = 'open';
    this.#race?.won(connection);
  }

  /** @param {Connection} connection @param {RefusedError} reason */
  authFailed(connection, reason) {
    if (connection.phase === 'authenticating') this.failed(connection, reason);
    else this.#keepalive.retryRenewal(connection, reason);
  }

  /** The broker has announced its shutdown. @param {Connection} connection @param {number} seconds until the client should reconnect */
  leaving(connection, seconds) {
    connection.leaving = true;
    if (connection === this.present) this.#host.timers.set('move', seconds * 1000, () => this.#move(undefined));
  }

  // Connecting

  #connectNow() {
    this.#attemptedAt = this.#host.timers.now;
    this.#startRace(undefined);
  }

  /** @param {Kind[] | undefined} kinds only these */
  #startRace(kinds) {
    const { routes } = this.#options;
    const ways = routes(kinds, this.#host.timers.now);
    if (!ways.length) {
      return this.#notConnected(new DisconnectedError('no WebTransport and no WebSocket here', { final: true }));
    }
    this.#race = new ConnectionRace(this.#host.nextId(), ways, this.#options, {
      timers: this.#host.timers,
      open: (route) => {
        const connection = new Connection(this.#host.nextId(), route, this.#options.parse, (ready) => this.#host.effect('flush', ready));
        this.#host.effect('open', connection);
        return connection;
      },
      close: (connection) => this.#close(connection, 0),
      won: (connection) => {
        this.#race = undefined;
        this.#options.won(connection.kind, this.#host.timers.now);
        if (this.present) this.#startMove(connection);
        else this.#useFirst(connection);
      },
      failed: (why) => {
        this.#race = undefined;
        this.#notConnected(why);
      },
    });
    this.#race.begin();
  }

  /** Every attempt has failed. @param {Error} why */
  #notConnected(why) {
    const moving = this.#moving;
    this.#moving = undefined;
    if (!this.present) return this.#reconnectLater(why, 'all attempts failed');
    // A failed move to WebTransport is not reported as an error.
    if (moving !== 'upgrade') this.#host.emit('error', why);
    if (this.present.leaving) this.#host.timers.set('move', this.#delay(this.#tries++), () => this.#move(undefined));
    else this.#upgradeLater();
  }

  /** There is no connection: try again later, unless the error is final. @param {Error} why @param {string} event */
  #reconnectLater(why, event) {
    const { autoReconnect, renewable } = this.#options;
    this.last = why;
    if (!autoReconnect || isFinal(why, renewable)) return this.stop(why, 'final error');
    this.#host.emit('error', why);
    this.#transition(event);
    if (this.#race) return; // A move is already under way: it is the next attempt.
    let delay = this.#delay(this.#tries++);
    if (why instanceof RefusedError && why.retryAfter !== undefined) {
      delay = Math.max(delay, Math.min(why.retryAfter * 1000, MAX_RETRY_AFTER) + this.#delay(0));
    }
    this.#host.timers.set('reconnect', delay, () => this.#connectNow());
  }

  /** @param {number} tries */
  #delay(tries) {
    const { reconnectDelay, maxReconnectDelay, reconnectJitter, random } = this.#options;
    const delay = Math.min(maxReconnectDelay, reconnectDelay * 2 ** Math.min(tries, 30));
    return delay * (1 + reconnectJitter * (2 * random() - 1));
  }

  /** Use a connection when there was none. @param {Connection} connection */
  #useFirst(connection) {
    this.#moving = undefined;
    this.#use(connection);
    this.#endForeign(connection);
    this.#host.subscriptions.resume(connection);
    this.#resumeRequests(connection);
    this.#host.emit('transport', connection.kind);
    this.#transition('authenticated');
    this.#host.arrived();
  }

  /** @param {Connection} connection */
  #use(connection) {
    this.present = connection;
    this.identity = connection.clientId;
    this.#connectedAt = this.#host.timers.now;
    this.#keepalive.startPings(connection);
    this.#upgradeLater();
  }

  /** @param {Connection} connection */
  #resumeRequests(connection) {
    this.producer = connection.producer;
    this.#host.publishes.resume(connection);
    this.#host.requests.resume(connection);
    this.#host.memberships.resume(connection);
  }

  /** @param {Connection} connection */
  #endForeign({ clientId }) {
    for (const each of [this.#host.subscriptions, this.#host.memberships]) each.endForeign(clientId);
  }

  /** Handle the end of a connection. @param {Connection} connection @param {DisconnectedError} why @param {number | undefined} code the close code to send, unless the broker has closed */
  lose(connection, why, code) {
    if (connection.phase === 'ended') return;
    if (this.#race?.has(connection)) return this.#race.failed(connection, why);
    this.#close(connection, code);
    if (connection === this.next) {
      // Return to the connection before it, if that is still open.
      this.next = this.#moving = undefined;
      this.#host.subscriptions.lose(connection);
      if (this.present) {
        this.#host.subscriptions.resume(this.present);
        this.#host.publishes.release();
        this.#notConnected(why);
      }
    } else if (connection === this.present) {
      this.#detach(connection, why);
      if (this.next) return this.#finishMove();
      // A connection that is closed at once counts as a failure.
      if (this.#host.timers.now - this.#connectedAt >= this.#delay(this.#tries)) this.#tries = 0;
      if (this.#moving === 'upgrade') {
        // It tries WebTransport only.
        this.#race?.abort();
        this.#race = undefined;
      }
      this.#moving = undefined;
      this.#host.timers.cancel('move');
      this.#host.timers.cancel('upgrade');
      this.#reconnectLater(why, 'connection lost');
    }
  }

  /** @param {Connection} connection @param {Error} why */
  #detach(connection, why) {
    this.present = undefined;
    this.#host.subscriptions.lose(connection);
    this.#host.publishes.lose(connection, why);
    this.#host.requests.lose(connection);
    this.#host.memberships.lose(connection);
  }

  /** @param {Connection} connection @param {number | undefined} code */
  #close(connection, code) {
    if (connection.phase === 'ended') return;
    connection.phase = 'ended';
    this.#keepalive.stop(connection);
    if (code !== undefined) this.#host.effect('close', connection, code);
  }

  // Moving

  /** Schedule the next attempt to move to WebTransport. */
  #upgradeLater() {
    const { upgradable, upgradeInterval } = this.#options;
    if (!upgradable || this.present?.kind === 'webtransport') return this.#host.timers.cancel('upgrade');
    this.#host.timers.set('upgrade', upgradeInterval, () => {
      if (this.#race || this.next) this.#upgradeLater();
      else this.#move(['webtransport']);
    });
  }

  /** Start a move to another connection. @param {Kind[] | undefined} kinds */
  #move(kinds) {
    // The end of a move that is under way decides whether another one is needed.
    if (!this.present || this.#race || this.next) return;
    this.#moving = kinds ? 'upgrade' : 'leave';
    this.#startRace(kinds);
  }

  /**
   * Move to another connection without losing or repeating anything: the old one delivers to each subscription until the new
   * one has replied, and no new publish is sent before the old one has replied to everything.
   *
   * @param {Connection} connection
   */
  #startMove(connection) {
    this.next = connection;
    this.#moving = undefined;
    this.#keepalive.startPings(connection);
    this.#host.publishes.hold();
    this.#endForeign(connection);
    this.#host.subscriptions.resume(connection);
    this.#repliesTimedOut = this.#subscribesTimedOut = false;
    this.#host.timers.set('replies', ACKNOWLEDGEMENT_TIMEOUT, () => (this.#repliesTimedOut = true));
    this.#host.timers.set('asks', this.#options.connectTimeout, () => (this.#subscribesTimedOut = true));
  }

  /** Finish the move if the old connection is not needed any more. Called after every event. */
  settleMove() {
    if (
      this.next &&
      (this.#repliesTimedOut || !this.#host.publishes.awaitingReply) &&
      (this.#subscribesTimedOut || !this.#host.subscriptions.awaitingReply)
    ) {
      this.#finishMove();
    }
  }

  #finishMove() {
    const connection = /** @type {Connection} */ (this.next);
    const old = this.present;
    this.next = undefined;
    this.#host.timers.cancel('replies');
    this.#host.timers.cancel('asks');
    this.#host.timers.cancel('move');
    if (old) {
      this.#close(old, 0);
      this.#detach(old, new DisconnectedError('moved to another connection'));
    }
    this.#tries = 0;
    this.#use(connection);
    this.#resumeRequests(connection);
    this.#host.emit('transport', connection.kind);
    this.#transition('moved');
    if (connection.leaving) this.#host.timers.set('move', this.#delay(this.#tries++), () => this.#move(undefined));
  }

  // Helpers

  /** @param {string} event */
  #transition(event) {
    const state = TRANSITIONS[this.state][event];
    if (!state) throw new Error(`${event} in the state ${this.state}`);
    if (state === this.state) return;
    this.state = state;
    this.#host.emit('state', state);
  }
}
