/**
 * The client without promises, timers or I/O. Events of connections, messages of the broker, calls of the application and
 * the time go in; requests, settlements and callbacks come out as `effects`, which the caller carries out in order.
 *
 * Each thing has one owner: `SubscriptionManager` a subscription, `Memberships` a membership, `InFlightPublishes` a publish,
 * `InFlightRequests` any other request, `ConnectionRace` an attempt to connect, `ConnectionSupervisor` the present connection
 * and the next one.
 *
 * @module
 */

import { DisconnectedError, RefusedError, asError, closedBy } from './errors.js';
import { HANDLERS } from './message_handlers.js';
import { InFlightPublishes } from './in_flight_publishes.js';
import { InFlightRequests } from './in_flight_requests.js';
import { Memberships } from './memberships.js';
import { SubscriptionManager } from './subscription_manager.js';
import { ConnectionSupervisor } from './connection_supervisor.js';
import { Timers } from './timers.js';

/** @typedef {import('./broker_addresses.js').Kind} Kind */
/** @typedef {import('./connection.js').Connection} Connection */
/** @typedef {import('./connection.js').IncomingStream} IncomingStream */

/**
 * The callback of a request, called when it is settled.
 *
 * @typedef {(error: Error | undefined, value?: any) => void} Settler
 */

/**
 * An effect: what to do, and its arguments.
 *
 * @typedef {['open', Connection] | ['token', Connection] | ['flush', Connection] | ['close', Connection, number]
 *   | ['settle', Settler, Error | undefined, any]
 *   | ['notify', any, import('./shared_subscription.js').What, any]
 *   | ['emit', string, any]} Effect
 */

/**
 * @typedef {object} CoreOptions
 * @property {(kinds: Kind[] | undefined, now: number) => {url: string, kind: Kind}[]} routes the addresses to try
 * @property {(kind: Kind, now: number) => void} won called with the transport that won a race
 * @property {boolean} upgradable whether to move to WebTransport when another transport is used
 * @property {boolean} renewable whether the client can get another token
 * @property {boolean} autoReconnect
 * @property {number} reconnectDelay
 * @property {number} maxReconnectDelay
 * @property {number} reconnectJitter
 * @property {number} pingInterval
 * @property {number} pingTimeout
 * @property {boolean} offlineQueue
 * @property {number} maxQueueSize
 * @property {number} connectTimeout
 * @property {number} headStart
 * @property {number} upgradeInterval
 * @property {(json: string) => any} parse
 * @property {() => number} random from 0 to 1
 */

const PROTOCOL = 1;

export class Core {
  /** @type {Effect[]} */
  effects = [];
  timers = new Timers();
  /** Milliseconds since 1970, by the clock of this device, which may be wrong and set. */
  wall = 0;

  #options;
  #ids = 0;
  /** The settlers of `connect` calls. @type {Map<number, Settler>} */
  #connecting = new Map();

  /** @param {CoreOptions} options */
  constructor(options) {
    this.#options = options;
    this.publishes = new InFlightPublishes(this, options.autoReconnect);
    this.requests = new InFlightRequests(this);
    this.subscriptions = new SubscriptionManager(this);
    this.memberships = new Memberships(this);
    this.supervisor = new ConnectionSupervisor(options, this);
  }

  get state() {
    return this.supervisor.state;
  }

  /** The present connection. @returns {Connection | undefined} */
  get present() {
    return this.supervisor.present;
  }

  /**
   * Set the time. Called before every other call.
   *
   * @param {number} now milliseconds of a clock that never goes back @param {number} wall milliseconds since 1970
   */
  advance(now, wall) {
    this.wall = wall;
    this.timers.advance(now);
    this.supervisor.settleMove();
  }

  // Calls of the application

  /** @param {Settler} settler @param {number} timeout milliseconds until it is rejected; the client keeps trying */
  connect(settler, timeout) {
    if (this.state === 'connected') return this.settle(settler, undefined);
    const id = this.nextId();
    this.#connecting.set(id, settler);
    if (timeout < Infinity) {
      this.timers.set(`connected ${id}`, timeout, () => {
        const { last } = this.supervisor;
        this.#settleConnect(id, new DisconnectedError(`not connected after ${timeout} ms: ${last?.message ?? 'still trying'}`));
      });
    }
    this.supervisor.start();
  }

  /** Disconnect. Subscriptions stay, and resume with the next `connect`. */
  disconnect() {
    this.supervisor.stop(new DisconnectedError('disconnected by this client'), 'disconnect()');
  }

  /** @param {string} body @param {boolean} ephemeral @param {Settler} settler @param {boolean} [expectsNone] whether it has `expect: 0` */
  publish(body, ephemeral, settler, expectsNone = false) {
    if (ephemeral) return this.publishes.publishEphemeral(body, settler);
    const { present, running, identity } = this.supervisor;
    if (!present) {
      const { offlineQueue, maxQueueSize } = this.#options;
      if (!offlineQueue || !running) return this.settle(settler, new DisconnectedError('not connected'));
      const { waiting } = this.publishes;
      if (waiting >= maxQueueSize) {
        return this.settle(settler, new RefusedError('overloaded', `${waiting} messages wait already`));
      }
    }
    this.publishes.publish(body, settler, identity, expectsNone);
  }

  /** @param {string} pattern @param {number | undefined} limit @param {number | undefined} before @param {Settler} settler */
  history(pattern, limit, before, settler) {
    if (!this.supervisor.running) return this.settle(settler, new DisconnectedError('not connected'));
    const { head, epoch } = this.present ?? { head: undefined, epoch: '' };
    this.requests.history(pattern, limit, before, (error, page) =>
      this.settle(settler, error, page && { ...page, head, epoch: this.present?.epoch ?? epoch }),
    );
  }

  /** @param {string} pattern @param {number | undefined} limit @param {string | undefined} after @param {Settler} settler */
  members(pattern, limit, after, settler) {
    if (!this.supervisor.running) return this.settle(settler, new DisconnectedError('not connected'));
    this.requests.members(pattern, limit, after, (error, page) => this.settle(settler, error, page));
  }

  /** @param {Settler} settler */
  ping(settler) {
    if (!this.present) return this.settle(settler, new DisconnectedError('not connected'));
    this.requests.ping((error, ms) => this.settle(settler, error, ms));
  }

  /** Check the connection: the network is back, or the page is visible again. */
  wake() {
    this.supervisor.wake();
  }

  // Events of connections

  /** The transport of a connection is open. @param {Connection} connection */
  opened(connection) {
    this.supervisor.opened(connection);
  }

  /** A connection could not be opened. @param {Connection} connection @param {Error} why */
  failed(connection, why) {
    this.supervisor.failed(connection, why);
  }

  /** The token function has returned a token. @param {Connection} connection @param {string} token */
  gotToken(connection, token) {
    if (connection.phase === 'token') connection.phase = 'authenticating';
    else if (connection.phase !== 'open') return;
    connection.token = token;
    connection.asking = true;
    const { producer } = this.supervisor;
    connection.send({ type: 'auth', token, protocol: PROTOCOL, ...(producer && connection.phase === 'authenticating' && { producer }) });
  }

  /** The token function has failed. @param {Connection} connection @param {unknown} thrown */
  noToken(connection, thrown) {
    this.supervisor.noToken(connection, asError(thrown));
    this.supervisor.settleMove();
  }

  /** Text has arrived on the main stream, or on another one. @param {Connection} connection @param {string} text @param {unknown} [stream] */
  received(connection, text, stream) {
    if (connection.phase === 'ended') return;
    connection.heard = this.timers.now;
    const incoming = connection.incoming(stream);
    try {
      incoming.splitter.feed(text, (object) => this.#handle(incoming, object));
    } catch (error) {
      if (!(error instanceof SyntaxError || (error instanceof Error && 'code' in error))) throw error;
      // The rest of the stream cannot be parsed.
      this.lose(connection, new DisconnectedError(error.message), 4000);
    }
    this.supervisor.settleMove();
  }

  /** A datagram has arrived. @param {Connection} connection @param {any} object */
  receivedDatagram(connection, object) {
    if (connection.phase !== 'ended' && object?.type === 'message' && object.seq === undefined) {
      this.subscriptions.message(object, connection.main);
    }
  }

  /** @param {Connection} connection @param {number} code @param {string} reason */
  closed(connection, code, reason) {
    this.lose(connection, closedBy(code, reason));
    this.supervisor.settleMove();
  }

  // Messages of the broker of the connection; for everything else see `message_handlers.js`

  /** @param {Connection} connection @param {any} answer */
  authenticated(connection, answer) {
    if (!connection.asking) return;
    connection.asking = false;
    connection.accept(answer);
    this.supervisor.authenticated(connection, this.wall);
  }

  /** @param {Connection} connection @param {RefusedError} reason */
  authFailed(connection, reason) {
    if (!connection.asking) return;
    connection.asking = false;
    this.supervisor.authFailed(connection, reason);
  }

  /** @param {Connection} connection @param {any} pong */
  pong(connection, pong) {
    const sent = connection.pings.get(pong.seq);
    if (sent === undefined) return void this.requests.answered(pong.seq, undefined, pong);
    connection.pings.delete(pong.seq);
    // The connection works, so requests that are much older than this ping get no reply any more.
    this.publishes.timeOutBefore(sent);
    this.requests.timeOutBefore(sent);
    if (this.subscriptions.stuckSince(sent) || this.memberships.stuckSince(sent)) {
      this.lose(connection, new DisconnectedError('the broker does not answer'), 4000);
    }
  }

  /** @param {Connection} connection @param {{reason: string, reconnect_in: number}} goaway */
  leaving(connection, { reason, reconnect_in: reconnectIn }) {
    this.emit('goaway', { reason, reconnectIn });
    this.supervisor.leaving(connection, Math.max(0, Number(reconnectIn) || 0));
  }

  // Services for the parts of the core

  nextId() {
    return ++this.#ids;
  }

  /** @param {Effect} effect */
  effect(...effect) {
    this.effects.push(effect);
  }

  /** @param {Settler} settler @param {Error | undefined} error @param {unknown} [value] */
  settle(settler, error, value) {
    this.effect('settle', settler, error, value);
  }

  /** @param {{target: any}} subscriber @param {import('./shared_subscription.js').What} what @param {any} [value] */
  notify(subscriber, what, value) {
    this.effect('notify', subscriber.target, what, value);
  }

  /** @param {string} event @param {any} value */
  emit(event, value) {
    this.effect('emit', event, value);
  }

  /** Settle all `connect` calls: there is a connection, or there will be none. @param {Error} [error] */
  arrived(error) {
    for (const id of [...this.#connecting.keys()]) this.#settleConnect(id, error);
  }

  /** A connection has ended. @param {Connection} connection @param {DisconnectedError} why @param {number} [code] the close code to send, unless the broker has closed */
  lose(connection, why, code) {
    this.supervisor.lose(connection, why, code);
  }

  // Helpers

  /** @param {IncomingStream} incoming @param {any} object */
  #handle(incoming, object) {
    // Unknown types are ignored (section 15).
    if (incoming.connection.phase !== 'ended' && Object.hasOwn(HANDLERS, object.type)) HANDLERS[object.type](this, object, incoming);
  }

  /** @param {number} id @param {Error | undefined} error */
  #settleConnect(id, error) {
    const settler = this.#connecting.get(id);
    this.#connecting.delete(id);
    this.timers.cancel(`connected ${id}`);
    if (settler) this.settle(settler, error);
  }
}
