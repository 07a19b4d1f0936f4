/**
 * The connections of one client, one after the other: the present one, and the next one while the client moves.
 *
 * @module
 */

import { Dial } from './dial.js';
import { DisconnectedError, RefusedError, isFinal } from './errors.js';
import { Link } from './link.js';
import { TRANSITIONS } from './states.js';
import { Upkeep } from './upkeep.js';

/** @typedef {import('./core.js').CoreOptions} CoreOptions */
/** @typedef {import('./routes.js').Kind} Kind */
/** @typedef {import('./states.js').ConnectionState} ConnectionState */

/** How long to wait at most, where the broker says that the token is not valid yet: milliseconds. */
const LONGEST_WAIT = 300_000;
/** How long the old connection has to answer what it was sent before the client goes over to the next one. */
const REPLIES = 2000;
/** No network event makes tries follow each other sooner than this. */
const BETWEEN_TRIES = 1000;

/**
 * @typedef {import('./upkeep.js').Host & More} Host
 *
 * @typedef {object} More
 * @property {import('./publishes.js').Publishes} publishes
 * @property {import('./requests.js').Requests} requests
 * @property {import('./subscriptions.js').Subscriptions} subscriptions
 * @property {(error?: Error) => void} arrived there is a connection, or there will be none
 */

export class Supervisor {
  /** @type {ConnectionState} */
  state = 'disconnected';
  /** The connection that is used. @type {Link | undefined} */
  present;
  /** The one that takes its place, while the client moves. @type {Link | undefined} */
  next;
  running = false;
  /** Why it is not connected. @type {Error | undefined} */
  last;
  /** The client_id of the last session. @type {string | null | undefined} */
  identity;
  /** Under which name the broker knows this publisher. @type {string | undefined} */
  producer;

  #host;
  #options;
  #upkeep;
  /** @type {Dial | undefined} */
  #dial;
  /** What the dial is for, while there is a connection. @type {'upgrade' | 'leave' | undefined} */
  #moving;
  #repliesOver = false;
  #asksOver = false;
  #tries = 0;
  #connectedAt = 0;
  #dialledAt = -Infinity;

  /** @param {CoreOptions} options @param {Host} host */
  constructor(options, host) {
    this.#options = options;
    this.#host = host;
    this.#upkeep = new Upkeep(options, host);
  }

  start() {
    if (this.running) return;
    this.running = true;
    this.#tries = 0;
    this.#go('connect()');
    this.#redial();
  }

  /** There will be no further connection for now. @param {Error} why @param {'disconnect()' | 'ended for good'} event */
  stop(why, event) {
    if (!this.running) return;
    const { timers, publishes, requests, subscriptions } = this.#host;
    this.last = why;
    this.running = false;
    this.identity = undefined;
    this.#dial?.abort();
    this.#dial = this.#moving = undefined;
    for (const link of [this.present, this.next]) {
      if (!link) continue;
      this.#close(link, 0);
      this.#forget(link, why);
    }
    this.next = undefined;
    for (const name of ['reconnect', 'move', 'upgrade', 'replies', 'asks']) timers.cancel(name);
    publishes.fail(why);
    requests.fail(why);
    if (event === 'ended for good') subscriptions.endAll(why);
    this.#go(event);
    this.#host.arrived(why);
  }

  /** There is a network again, or the page is seen again: see at once whether the connection lives, or try to get one. */
  wake() {
    const { timers } = this.#host;
    if (this.present) this.#upkeep.wake(this.present);
    else if (timers.has('reconnect') && timers.now - this.#dialledAt >= BETWEEN_TRIES) {
      timers.cancel('reconnect');
      this.#redial();
    }
  }

  // What happens to links

  /** Its transport is open. @param {Link} link */
  opened(link) {
    if (link.phase !== 'opening') return;
    link.phase = 'token';
    if (!this.present) this.#go('a transport is open');
    this.#host.effect('token', link);
  }

  /** A way leads nowhere. @param {Link} link @param {Error} why */
  failed(link, why) {
    this.#dial?.failed(link, why);
  }

  /** There is no token. A `RefusedError` says that there will be none. @param {Link} link @param {Error} why */
  noToken(link, why) {
    if (link.phase === 'ended') return;
    if (why instanceof RefusedError) this.stop(why, 'ended for good');
    else if (link.phase === 'open') this.#upkeep.renewAgain(link, why);
    else this.failed(link, why);
  }

  /** @param {Link} link @param {number} wall milliseconds since 1970 */
  authenticated(link, wall) {
    this.#upkeep.renewLater(link, wall);
    if (link.phase !== 'authenticating') return;
    link.phase = 'open';
    this.#dial?.won(link);
  }

  /** @param {Link} link @param {RefusedError} reason */
  notAuthenticated(link, reason) {
    if (link.phase === 'authenticating') this.failed(link, reason);
    else this.#upkeep.renewAgain(link, reason);
  }

  /** The broker is about to stop. @param {Link} link @param {number} seconds until another connection should be made */
  leaving(link, seconds) {
    link.leaving = true;
    if (link === this.present) this.#host.timers.set('move', seconds * 1000, () => this.#move(undefined));
  }

  // Connecting

  #redial() {
    this.#dialledAt = this.#host.timers.now;
    this.#startDial(undefined);
  }

  /** @param {Kind[] | undefined} kinds only these */
  #startDial(kinds) {
    const { routes } = this.#options;
    const ways = routes(kinds, this.#host.timers.now);
    if (!ways.length) {
      return this.#notConnected(new DisconnectedError('there is neither WebTransport nor WebSocket here', { final: true }));
    }
    this.#dial = new Dial(this.#host.nextId(), ways, this.#options, {
      timers: this.#host.timers,
      open: (route) => {
        const link = new Link(this.#host.nextId(), route, this.#options.parse, (ready) => this.#host.effect('flush', ready));
        this.#host.effect('open', link);
        return link;
      },
      close: (link) => this.#close(link, 0),
      won: (link) => {
        this.#dial = undefined;
        this.#options.won(link.kind, this.#host.timers.now);
        if (this.present) this.#takeOver(link);
        else this.#adopt(link);
      },
      failed: (why) => {
        this.#dial = undefined;
        this.#notConnected(why);
      },
    });
    this.#dial.begin();
  }

  /** Every way has failed. @param {Error} why */
  #notConnected(why) {
    const moving = this.#moving;
    this.#moving = undefined;
    if (!this.present) return this.#comeBack(why, 'every way has failed');
    // That WebTransport does not get through, still, is nobody's error.
    if (moving !== 'upgrade') this.#host.emit('error', why);
    if (this.present.leaving) this.#host.timers.set('move', this.#delay(this.#tries++), () => this.#move(undefined));
    else this.#upgradeLater();
  }

  /** There is no connection: try again later, unless that is no use. @param {Error} why @param {string} event */
  #comeBack(why, event) {
    const { autoReconnect, renewable } = this.#options;
    this.last = why;
    if (!autoReconnect || isFinal(why, renewable)) return this.stop(why, 'ended for good');
    this.#host.emit('error', why);
    this.#go(event);
    if (this.#dial) return; // A move was on its way: it is the next try.
    let delay = this.#delay(this.#tries++);
    if (why instanceof RefusedError && why.retryAfter !== undefined) {
      delay = Math.max(delay, Math.min(why.retryAfter * 1000, LONGEST_WAIT) + this.#delay(0));
    }
    this.#host.timers.set('reconnect', delay, () => this.#redial());
  }

  /** @param {number} tries */
  #delay(tries) {
    const { reconnectDelay, maxReconnectDelay, reconnectJitter, random } = this.#options;
    const delay = Math.min(maxReconnectDelay, reconnectDelay * 2 ** Math.min(tries, 30));
    return delay * (1 + reconnectJitter * (2 * random() - 1));
  }

  /** There is a connection where there was none. @param {Link} link */
  #adopt(link) {
    this.#moving = undefined;
    this.#use(link);
    this.#host.subscriptions.belongTo(link.clientId);
    this.#host.subscriptions.resume(link);
    this.#resumeRequests(link);
    this.#host.emit('transport', link.kind);
    this.#go('the token is accepted');
    this.#host.arrived();
  }

  /** @param {Link} link */
  #use(link) {
    this.present = link;
    this.identity = link.clientId;
    this.#connectedAt = this.#host.timers.now;
    this.#upkeep.keepAlive(link);
    this.#upgradeLater();
  }

  /** @param {Link} link */
  #resumeRequests(link) {
    this.producer = link.producer;
    this.#host.publishes.resume(link);
    this.#host.requests.resume(link);
  }

  /** It has ended. @param {Link} link @param {DisconnectedError} why @param {number | undefined} code to close it with, where it has not closed by itself */
  lose(link, why, code) {
    if (link.phase === 'ended') return;
    if (this.#dial?.has(link)) return this.#dial.failed(link, why);
    this.#close(link, code);
    if (link === this.next) {
      // Back to the one before, while it is there.
      this.next = this.#moving = undefined;
      this.#host.subscriptions.lose(link);
      if (this.present) {
        this.#host.subscriptions.resume(this.present);
        this.#host.publishes.release();
        this.#notConnected(why);
      }
    } else if (link === this.present) {
      this.#forget(link, why);
      if (this.next) return this.#finishMove();
      // One that is closed as soon as it is there counts as a failure.
      if (this.#host.timers.now - this.#connectedAt >= this.#delay(this.#tries)) this.#tries = 0;
      if (this.#moving === 'upgrade') {
        // It tries one way only.
        this.#dial?.abort();
        this.#dial = undefined;
      }
      this.#moving = undefined;
      this.#host.timers.cancel('move');
      this.#host.timers.cancel('upgrade');
      this.#comeBack(why, 'the connection is lost');
    }
  }

  /** @param {Link} link @param {Error} why */
  #forget(link, why) {
    this.present = undefined;
    this.#host.subscriptions.lose(link);
    this.#host.publishes.lose(link, why);
    this.#host.requests.lose(link);
  }

  /** @param {Link} link @param {number | undefined} code */
  #close(link, code) {
    if (link.phase === 'ended') return;
    link.phase = 'ended';
    this.#upkeep.stop(link);
    if (code !== undefined) this.#host.effect('close', link, code);
  }

  // Moving

  /** Try WebTransport again where it has not got through. */
  #upgradeLater() {
    const { upgradable, upgradeInterval } = this.#options;
    if (!upgradable || this.present?.kind === 'webtransport') return this.#host.timers.cancel('upgrade');
    this.#host.timers.set('upgrade', upgradeInterval, () => {
      if (this.#dial || this.next) this.#upgradeLater();
      else this.#move(['webtransport']);
    });
  }

  /** Look for another connection while there is one. @param {Kind[] | undefined} kinds */
  #move(kinds) {
    // Where a move is on its way already, its end says whether another is needed.
    if (!this.present || this.#dial || this.next) return;
    this.#moving = kinds ? 'upgrade' : 'leave';
    this.#startDial(kinds);
  }

  /**
   * Go over to another connection without losing or repeating anything: each subscription hears the old one until the new
   * one has agreed, and nothing new is published before everything on the old one is answered.
   *
   * @param {Link} link
   */
  #takeOver(link) {
    this.next = link;
    this.#moving = undefined;
    this.#upkeep.keepAlive(link);
    this.#host.publishes.hold();
    this.#host.subscriptions.belongTo(link.clientId);
    this.#host.subscriptions.resume(link);
    this.#repliesOver = this.#asksOver = false;
    this.#host.timers.set('replies', REPLIES, () => (this.#repliesOver = true));
    this.#host.timers.set('asks', this.#options.connectTimeout, () => (this.#asksOver = true));
  }

  /** Something has happened: see whether the old connection is still needed, and send what there is. */
  settleMove() {
    if (
      this.next &&
      (this.#repliesOver || !this.#host.publishes.inDoubt) &&
      (this.#asksOver || !this.#host.subscriptions.asking)
    ) {
      this.#finishMove();
    }
  }

  #finishMove() {
    const link = /** @type {Link} */ (this.next);
    const old = this.present;
    this.next = undefined;
    this.#host.timers.cancel('replies');
    this.#host.timers.cancel('asks');
    this.#host.timers.cancel('move');
    if (old) {
      this.#close(old, 0);
      this.#forget(old, new DisconnectedError('the client has moved to another connection'));
    }
    this.#tries = 0;
    this.#use(link);
    this.#resumeRequests(link);
    this.#host.emit('transport', link.kind);
    this.#go('moved to another connection');
    if (link.leaving) this.#host.timers.set('move', this.#delay(this.#tries++), () => this.#move(undefined));
  }

  // Helpers

  /** @param {string} event */
  #go(event) {
    const state = TRANSITIONS[this.state][event];
    if (!state) throw new Error(`${event} in the state ${this.state}`);
    if (state === this.state) return;
    this.state = state;
    this.#host.emit('state', state);
  }
}
