/**
 * The publishes of one client that have no answer yet, whichever connection will bring it.
 *
 * A publish is sent in its turn, and kept until it is answered. When the connection is lost first, or the broker does not
 * know, it is in doubt: it is sent again under its old id, on the next connection by `resume` and on this one by `retry`.
 * Newer ones wait until everything in doubt is answered, or they would overtake it. Nothing is in doubt for ever: after
 * `MAX_TRIES` on one connection, or `MAX_LOST_CONNECTIONS` connections, it is settled as `unknown`, and the others go on (section 9.1).
 *
 * @module
 */

import { ANOTHER_CLIENT, DisconnectedError, RefusedError, RETRYABLE } from './errors.js';

/** @typedef {import('./connection.js').Connection} Connection */
/** @typedef {import('./core.js').Settler} Settler */

/** How often a publish is sent at most on one connection. */
const MAX_TRIES = 6;
/** On how many connections that were lost a publish may have been without an answer. */
const MAX_LOST_CONNECTIONS = 20;
const RETRY_PAUSE = 500;
/** How long a publish may be without an answer on a connection that answers pings, in milliseconds. */
export const REPLY_TIMEOUT = 30_000;
/** How many publishes may be without an answer where the broker names no limit. */
const DEFAULT_PENDING_PUBLISHES = 1000;
/** Bytes that are added to a body: the type, the id, and what a retry says. */
const REQUEST_OVERHEAD = 256;

/**
 * @typedef {object} Publish
 * @property {number} id
 * @property {string} body `"channel":...,"payload":...` and what else never changes
 * @property {Settler} settler
 * @property {string | null | undefined} owner whose it is: the client_id under which it was asked for, where that is known
 * @property {number} after what was known when it was first sent
 * @property {string} epoch
 * @property {number} tries on this connection
 * @property {number} losses
 * @property {number} at when it was last sent
 */

/**
 * @typedef {object} Host
 * @property {import('./timers.js').Timers} timers
 * @property {() => number} nextId
 * @property {(settler: Settler, error: Error | undefined, value?: unknown) => void} settle
 */

export class InFlightPublishes {
  #host;
  #reconnects;
  /** @type {Connection | undefined} */
  #connection;
  #paused = false;
  #producer = '';
  /** The highest id that the log has taken. */
  #highestLoggedId = 0;
  /** @type {Publish[]} */
  #unsent = [];
  /** In the order of their ids. @type {Map<number, Publish>} */
  #sent = new Map();
  /** The ids of those that an earlier try may have published. @type {Set<number>} */
  #uncertain = new Set();
  /** The ids of those among them that wait for `retry`. @type {Set<number>} */
  #toRetry = new Set();
  /** Those that a replica which stops has given back. @type {Publish[]} */
  #rejectedByDrain = [];
  /** Ephemeral ones, which are sent once. @type {Map<number, Settler>} */
  #ephemeral = new Map();

  /** @param {Host} host @param {boolean} reconnects whether there will be another connection after this one */
  constructor(host, reconnects) {
    this.#host = host;
    this.#reconnects = reconnects;
  }

  /** How many wait to be sent. */
  get waiting() {
    return this.#unsent.length;
  }

  /** Whether the answer to a publish may still come on this connection. */
  get awaitingReply() {
    return this.#sent.size > this.#toRetry.size || this.#ephemeral.size > 0;
  }

  /** @param {string} body @param {Settler} settler @param {string | null | undefined} owner */
  publish(body, settler, owner) {
    this.#unsent.push({ id: 0, body, settler, owner, after: 0, epoch: '', tries: 0, losses: 0, at: 0 });
    this.#sendUnsent();
  }

  /** @param {string} body @param {Settler} settler */
  publishEphemeral(body, settler) {
    const connection = this.#connection;
    if (!connection) return this.#host.settle(settler, new DisconnectedError('not connected'));
    const id = this.#host.nextId();
    this.#ephemeral.set(id, settler);
    connection.sendText(`{"type":"publish","id":${id},"ephemeral":true,${body}`);
  }

  // Between connections

  /** Keep what is asked for from now on, for the next connection. */
  hold() {
    this.#paused = true;
  }

  /** There is no next connection after all. */
  release() {
    this.#paused = false;
    if (this.#toRetry.size) this.#host.timers.set('retry publishes', RETRY_PAUSE, () => this.#retry());
    this.#sendUnsent();
  }

  /** Another connection is there, and authenticated: send what has no answer, oldest first. @param {Connection} connection */
  resume(connection) {
    const known = connection.producer === this.#producer && this.#producer !== '';
    this.#producer = connection.producer;
    for (const publish of [...this.#sent.values()]) {
      publish.tries = 0;
      if (known) this.#retryPublish(publish, connection);
      else this.#settleUnknown(publish, 'the broker has forgotten its producer');
    }
    const { clientId } = connection;
    this.#unsent = this.#unsent.filter(({ owner = clientId, settler }) => {
      if (owner === clientId) return true;
      this.#host.settle(settler, new RefusedError('unauthorized', ANOTHER_CLIENT));
    });
    this.#connection = connection;
    this.#paused = false;
    this.#sendUnsent();
  }

  /** A connection is gone: what has no answer has none to come from there. @param {Connection} connection @param {Error} why */
  lose(connection, why) {
    if (this.#connection !== connection) return;
    this.#connection = undefined;
    this.#host.timers.cancel('retry publishes');
    this.#uncertain.clear();
    this.#toRetry.clear();
    for (const id of [...this.#ephemeral.keys()]) this.#settleEphemeral(id, why);
    // Given back and sent again, it comes behind what may have been taken meanwhile: that is for its owner to decide.
    const newest = Math.max(this.#highestLoggedId, ...this.#sent.keys());
    const again = [];
    for (const publish of this.#rejectedByDrain) {
      if (publish.id > newest) again.push(publish);
      else this.#host.settle(publish.settler, new RefusedError('shutting_down', 'the log has newer messages'));
    }
    this.#rejectedByDrain = [];
    this.#unsent = [...again, ...this.#unsent];
    for (const publish of [...this.#sent.values()]) {
      if (++publish.losses > MAX_LOST_CONNECTIONS) this.#settleUnknown(publish, `${MAX_LOST_CONNECTIONS} connections were lost`);
    }
  }

  /** There will be no further connection for now: nothing that is unanswered ever will be. @param {Error} why */
  fail(why) {
    for (const publish of [...this.#sent.values()]) this.#settleUnknown(publish, why.message);
    for (const { settler } of [...this.#rejectedByDrain, ...this.#unsent]) this.#host.settle(settler, why);
    this.#rejectedByDrain = [];
    this.#unsent = [];
  }

  // What the broker says

  /** @param {number} id @param {number | undefined} seq @param {boolean} duplicate */
  published(id, seq, duplicate) {
    if (this.#settleEphemeral(id)) return;
    const publish = this.#sent.get(id);
    if (!publish) return;
    this.#remove(id);
    this.#highestLoggedId = Math.max(this.#highestLoggedId, id);
    this.#host.settle(publish.settler, undefined, { seq, duplicate });
    this.#sendUnsent();
  }

  /** @param {number} id @param {RefusedError} reason @returns {boolean} whether it was one of these */
  refused(id, reason) {
    if (this.#settleEphemeral(id, reason)) return true;
    const publish = this.#sent.get(id);
    if (!publish) return false;
    if (this.#uncertain.has(id) || reason.code === 'unknown') {
      this.#keepUncertain(publish, reason);
    } else {
      this.#remove(id);
      if (reason.code === 'shutting_down' && this.#reconnects) {
        // It is certain that it is not published, and the next replica can.
        this.#rejectedByDrain.push(publish);
        this.hold();
      } else {
        this.#host.settle(publish.settler, reason);
      }
    }
    this.#sendUnsent();
    return true;
  }

  /** The broker has answered what was asked at `moment`: what was sent long before gets no answer any more. @param {number} moment */
  timeOutBefore(moment) {
    for (const publish of [...this.#sent.values()]) {
      if (publish.at < moment - REPLY_TIMEOUT && !this.#toRetry.has(publish.id)) this.#settleUnknown(publish, 'the broker does not answer');
    }
    this.#sendUnsent();
  }

  // Helpers

  /** A try has brought no certainty: only another one can. @param {Publish} publish @param {RefusedError} reason */
  #keepUncertain(publish, reason) {
    const { id } = publish;
    this.#uncertain.add(id);
    if (reason.code === 'shutting_down' && this.#reconnects) {
      // The next replica will know.
      this.hold();
      this.#toRetry.add(id);
    } else if (RETRYABLE.has(reason.code) && publish.tries < MAX_TRIES) {
      this.#toRetry.add(id);
      const { timers } = this.#host;
      if (!timers.has('retry publishes')) timers.set('retry publishes', RETRY_PAUSE * publish.tries, () => this.#retry());
    } else {
      this.#settleUnknown(publish, reason.message);
    }
  }

  /** Ask again on this connection what became of those that are in doubt. */
  #retry() {
    const connection = this.#connection;
    if (!connection || this.#paused) return;
    const again = [...this.#toRetry].sort((a, b) => a - b);
    this.#toRetry.clear();
    for (const id of again) {
      const publish = this.#sent.get(id);
      if (publish) this.#retryPublish(publish, connection);
    }
    this.#sendUnsent();
  }

  /** Send again under its old id, unless nobody could know any more what became of it. @param {Publish} publish @param {Connection} connection */
  #retryPublish(publish, connection) {
    const { id, after, epoch, body } = publish;
    if (epoch !== connection.epoch || after < connection.floor - 1) {
      return this.#settleUnknown(publish, 'the log has changed too much to tell');
    }
    const over = sizeError(body, connection.limits);
    if (over) return this.#settleUnknown(publish, over.message);
    this.#uncertain.add(id);
    publish.tries++;
    publish.at = this.#host.timers.now;
    connection.sendText(`{"type":"publish","id":${id},"retry":true,"after":${after},"epoch":${JSON.stringify(epoch)},${body}`);
  }

  /** Send what has waited, unless something is in its way. */
  #sendUnsent() {
    const connection = this.#connection;
    if (!connection || this.#paused || this.#uncertain.size) return;
    const window = connection.limits.pending_publishes ?? DEFAULT_PENDING_PUBLISHES;
    let sent = 0;
    for (const publish of this.#unsent) {
      if (this.#sent.size >= window) break;
      sent++;
      const over = sizeError(publish.body, connection.limits);
      if (over) {
        this.#host.settle(publish.settler, over);
        continue;
      }
      // A new id each time, should it have been given back: the old one stays refused.
      const id = (publish.id = this.#host.nextId());
      Object.assign(publish, { after: connection.head, epoch: connection.epoch, tries: 1, at: this.#host.timers.now });
      this.#sent.set(id, publish);
      connection.sendText(`{"type":"publish","id":${id},${publish.body}`);
    }
    if (sent) this.#unsent = this.#unsent.slice(sent);
  }

  /** Nobody will ever know what became of it. @param {Publish} publish @param {string} why */
  #settleUnknown(publish, why) {
    this.#remove(publish.id);
    this.#host.settle(publish.settler, new RefusedError('unknown', `it may have been published: ${why}`));
  }

  /** @param {number} id @param {Error} [error] @returns {boolean} whether it was an ephemeral one */
  #settleEphemeral(id, error) {
    const settler = this.#ephemeral.get(id);
    if (settler) this.#host.settle(settler, error, {});
    return this.#ephemeral.delete(id);
  }

  /** @param {number} id */
  #remove(id) {
    this.#sent.delete(id);
    this.#uncertain.delete(id);
    this.#toRetry.delete(id);
  }
}

const encoder = new TextEncoder();

/**
 * Why a body cannot be sent, where it cannot: over the limit the broker closes the connection.
 *
 * @param {string} body @param {{message_size?: number}} limits
 */
export function sizeError(body, { message_size: size = 65_536 }) {
  if (encoder.encode(body).length > size - REQUEST_OVERHEAD) return new RefusedError('too_large', `a message may have at most ${size} bytes`);
}
