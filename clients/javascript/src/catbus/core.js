/**
 * The client without promises, timers or I/O. Link events, what the broker says, calls of the application and the time go
 * in; what to send, settlements and callbacks come out, as `effects`, which the caller carries out in their order.
 *
 * Each thing has one owner: a subscription `Subscriptions`, a publish `Publishes`, any other request `Requests`, a way
 * that is being tried its `Dial`, the present connection and the next one the `Supervisor`.
 *
 * @module
 */

import { DisconnectedError, RefusedError, asError, closedBy } from './errors.js';
import { HANDLERS } from './incoming.js';
import { Publishes } from './publishes.js';
import { Requests } from './requests.js';
import { Subscriptions } from './subscriptions.js';
import { Supervisor } from './supervisor.js';
import { Timers } from './timers.js';

/** @typedef {import('./routes.js').Kind} Kind */
/** @typedef {import('./link.js').Link} Link */
/** @typedef {import('./link.js').Lane} Lane */

/**
 * What is called when a request is settled.
 *
 * @typedef {(error: Error | undefined, value?: any) => void} Settler
 */

/**
 * What is to be done, and with what.
 *
 * @typedef {['open', Link] | ['token', Link] | ['flush', Link] | ['close', Link, number]
 *   | ['settle', Settler, Error | undefined, any]
 *   | ['tell', any, import('./feeds.js').What, any]
 *   | ['emit', string, any]} Effect
 */

/**
 * @typedef {object} CoreOptions
 * @property {(kinds: Kind[] | undefined, now: number) => {url: string, kind: Kind}[]} routes what can be tried
 * @property {(kind: Kind, now: number) => void} won told which kind has got through
 * @property {boolean} upgradable whether WebTransport is better than what else there may be
 * @property {boolean} renewable whether there are other tokens than the first
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
  /** Whom `connect` has promised something. @type {Map<number, Settler>} */
  #connecting = new Map();

  /** @param {CoreOptions} options */
  constructor(options) {
    this.#options = options;
    this.publishes = new Publishes(this, options.autoReconnect);
    this.requests = new Requests(this);
    this.subscriptions = new Subscriptions(this);
    this.supervisor = new Supervisor(options, this);
  }

  get state() {
    return this.supervisor.state;
  }

  /** The connection that is used. @returns {Link | undefined} */
  get present() {
    return this.supervisor.present;
  }

  /**
   * Say what time it is, before anything else that happens.
   *
   * @param {number} now milliseconds of a clock that never goes back @param {number} wall milliseconds since 1970
   */
  advance(now, wall) {
    this.wall = wall;
    this.timers.advance(now);
    this.supervisor.settleMove();
  }

  // What the application asks

  /** @param {Settler} settler @param {number} timeout milliseconds until it is rejected, while the client goes on trying */
  connect(settler, timeout) {
    if (this.state === 'connected') return this.settle(settler, undefined);
    const id = this.nextId();
    this.#connecting.set(id, settler);
    if (timeout < Infinity) {
      this.timers.set(`connected ${id}`, timeout, () => {
        const { last } = this.supervisor;
        this.#promised(id, new DisconnectedError(`not connected after ${timeout} ms: ${last?.message ?? 'still trying'}`));
      });
    }
    this.supervisor.start();
  }

  /** Leave. Subscriptions stay, and go on with the next `connect`. */
  disconnect() {
    this.supervisor.stop(new DisconnectedError('disconnected by this client'), 'disconnect()');
  }

  /** @param {string} body @param {boolean} ephemeral @param {Settler} settler */
  publish(body, ephemeral, settler) {
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
    this.publishes.publish(body, settler, identity);
  }

  /** @param {string} pattern @param {number | undefined} limit @param {number | undefined} before @param {Settler} settler */
  history(pattern, limit, before, settler) {
    if (!this.supervisor.running) return this.settle(settler, new DisconnectedError('not connected'));
    const { head, epoch } = this.present ?? { head: undefined, epoch: '' };
    this.requests.history(pattern, limit, before, (error, page) =>
      this.settle(settler, error, page && { ...page, head, epoch: this.present?.epoch ?? epoch }),
    );
  }

  /** @param {Settler} settler */
  ping(settler) {
    if (!this.present) return this.settle(settler, new DisconnectedError('not connected'));
    this.requests.ping((error, ms) => this.settle(settler, error, ms));
  }

  /** There is a network again, or the page is seen again. */
  wake() {
    this.supervisor.wake();
  }

  // What happens to links

  /** Its transport is open. @param {Link} link */
  opened(link) {
    this.supervisor.opened(link);
  }

  /** It could not be opened. @param {Link} link @param {Error} why */
  failed(link, why) {
    this.supervisor.failed(link, why);
  }

  /** Here is the token that was asked for. @param {Link} link @param {string} token */
  gotToken(link, token) {
    if (link.phase === 'token') link.phase = 'authenticating';
    else if (link.phase !== 'open') return;
    link.token = token;
    link.asking = true;
    const { producer } = this.supervisor;
    link.send({ type: 'auth', token, protocol: PROTOCOL, ...(producer && link.phase === 'authenticating' && { producer }) });
  }

  /** There is no token. @param {Link} link @param {unknown} thrown */
  noToken(link, thrown) {
    this.supervisor.noToken(link, asError(thrown));
    this.supervisor.settleMove();
  }

  /** Text has come on the session's stream, or on another one. @param {Link} link @param {string} text @param {unknown} [stream] */
  received(link, text, stream) {
    if (link.phase === 'ended') return;
    link.heard = this.timers.now;
    const lane = link.lane(stream);
    try {
      lane.splitter.feed(text, (object) => this.#handle(lane, object));
    } catch (error) {
      if (!(error instanceof SyntaxError || (error instanceof Error && 'code' in error))) throw error;
      // What follows cannot be understood any more.
      this.lose(link, new DisconnectedError(error.message), 4000);
    }
    this.supervisor.settleMove();
  }

  /** A whole object has come by itself. @param {Link} link @param {any} object */
  receivedDatagram(link, object) {
    if (link.phase !== 'ended' && object?.type === 'message' && object.seq === undefined) {
      this.subscriptions.message(object, link.main);
    }
  }

  /** @param {Link} link @param {number} code @param {string} reason */
  closed(link, code, reason) {
    this.lose(link, closedBy(code, reason));
    this.supervisor.settleMove();
  }

  // What the broker says of the connection; for everything else see `incoming.js`

  /** @param {Link} link @param {any} answer */
  authenticated(link, answer) {
    if (!link.asking) return;
    link.asking = false;
    link.accept(answer);
    this.supervisor.authenticated(link, this.wall);
  }

  /** @param {Link} link @param {RefusedError} reason */
  notAuthenticated(link, reason) {
    if (!link.asking) return;
    link.asking = false;
    this.supervisor.notAuthenticated(link, reason);
  }

  /** @param {Link} link @param {any} pong */
  ponged(link, pong) {
    const sent = link.pings.get(pong.seq);
    if (sent === undefined) return void this.requests.answered(pong.seq, undefined, pong);
    link.pings.delete(pong.seq);
    // The connection is well: what it should have answered long before gets no answer any more.
    this.publishes.giveUpBefore(sent);
    this.requests.giveUpBefore(sent);
    if (this.subscriptions.stuckBefore(sent)) {
      this.lose(link, new DisconnectedError('the broker does not answer'), 4000);
    }
  }

  /** @param {Link} link @param {{reason: string, reconnect_in: number}} goaway */
  leaving(link, { reason, reconnect_in: reconnectIn }) {
    this.emit('goaway', { reason, reconnectIn });
    this.supervisor.leaving(link, Math.max(0, Number(reconnectIn) || 0));
  }

  // What its parts ask

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

  /** @param {import('./readers.js').Reader} reader @param {import('./feeds.js').What} what @param {any} [value] */
  tell(reader, what, value) {
    this.effect('tell', reader.target, what, value);
  }

  /** @param {string} event @param {any} value */
  emit(event, value) {
    this.effect('emit', event, value);
  }

  /** There is a connection, or there will be none. @param {Error} [error] */
  arrived(error) {
    for (const id of [...this.#connecting.keys()]) this.#promised(id, error);
  }

  /** A connection has ended. @param {Link} link @param {DisconnectedError} why @param {number} [code] to close it with, where it has not closed by itself */
  lose(link, why, code) {
    this.supervisor.lose(link, why, code);
  }

  // Helpers

  /** @param {Lane} lane @param {any} object */
  #handle(lane, object) {
    // What is not known is for those who know it (section 15).
    if (lane.link.phase !== 'ended' && Object.hasOwn(HANDLERS, object.type)) HANDLERS[object.type](this, object, lane);
  }

  /** @param {number} id @param {Error | undefined} error */
  #promised(id, error) {
    const settler = this.#connecting.get(id);
    this.#connecting.delete(id);
    this.timers.cancel(`connected ${id}`);
    if (settler) this.settle(settler, error);
  }
}
