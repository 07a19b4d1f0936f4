/**
 * The table of publishes without a reply, which outlives connections.
 *
 * A publish is sent in order and kept until it is acknowledged. If the connection is lost first, or the broker does not
 * know the outcome, it is uncertain, and is sent again under its id: by `resume` on the next connection, by `retry` on this.
 * Newer publishes wait until no outcome is uncertain, or they would overtake it. No publish stays uncertain for ever: after
 * `MAX_TRIES` on one connection, or `MAX_LOST_CONNECTIONS`, it is settled as `unknown`, and the others continue (section 9.1).
 *
 * @module
 */

import { ANOTHER_CLIENT, DisconnectedError, RefusedError, RETRYABLE } from './errors.js';

/** @typedef {import('./connection.js').Connection} Connection */
/** @typedef {import('./core.js').Settler} Settler */

/** How often one connection sends an uncertain publish. */
const MAX_TRIES = 6;
/** The number of lost connections on which a publish may be without a reply. */
const MAX_LOST_CONNECTIONS = 20;
const RETRY_PAUSE = 500;
/** Milliseconds without a reply to a publish on a connection that answers pings. */
export const REPLY_TIMEOUT = 30_000;
/** Publishes without a reply if the broker names no limit. */
const DEFAULT_PENDING_PUBLISHES = 1000;
/** Bytes that are added to a body: the type, the id, and what a retry says. */
const REQUEST_OVERHEAD = 256;

/**
 * @typedef {object} Publish
 * @property {number} id
 * @property {string} body `"channel":...,"payload":...` and what else never changes
 * @property {Settler} settler
 * @property {string | null | undefined} owner the client_id under which it was made, if known
 * @property {boolean} expectsNone whether it is only published if there is no retained message
 * @property {number} after the head when it was first sent
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
  /** The highest id whose publish is in the log. */
  #highestLoggedId = 0;
  /** @type {Publish[]} */
  #unsent = [];
  /** By id, in the order of the ids. @type {Map<number, Publish>} */
  #sent = new Map();
  /** Ids of which an earlier try may have been published. @type {Set<number>} */
  #uncertain = new Set();
  /** The uncertain ids that wait for `retry`. @type {Set<number>} */
  #toRetry = new Set();
  /** Publishes that a draining replica has rejected, for the next replica. @type {Publish[]} */
  #rejectedByDrain = [];
  /** Ephemeral publishes, which are sent once. @type {Map<number, Settler>} */
  #ephemeral = new Map();

  /** @param {Host} host @param {boolean} reconnects whether another connection may follow */
  constructor(host, reconnects) {
    this.#host = host;
    this.#reconnects = reconnects;
  }

  /** The number of unsent publishes. */
  get waiting() {
    return this.#unsent.length;
  }

  /** Whether the present connection may still bring the reply to a publish. */
  get awaitingReply() {
    return this.#sent.size > this.#toRetry.size || this.#ephemeral.size > 0;
  }

  /** @param {string} body @param {Settler} settler @param {string | null | undefined} owner @param {boolean} expectsNone */
  publish(body, settler, owner, expectsNone) {
    this.#unsent.push({ id: 0, body, settler, owner, expectsNone, after: 0, epoch: '', tries: 0, losses: 0, at: 0 });
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

  // Changes of the connection

  /** Keep further publishes for the next connection. */
  hold() {
    this.#paused = true;
  }

  /** Send publishes here again: the next connection has failed. */
  release() {
    this.#paused = false;
    if (this.#toRetry.size) this.#host.timers.set('retry publishes', RETRY_PAUSE, () => this.#retry());
    this.#sendUnsent();
  }

  /** Send all publishes without a reply over an authenticated connection, oldest first. @param {Connection} connection */
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

  /** Handle the loss of a connection: no reply comes from it any more. @param {Connection} connection @param {Error} why */
  lose(connection, why) {
    if (this.#connection !== connection) return;
    this.#connection = undefined;
    this.#host.timers.cancel('retry publishes');
    this.#uncertain.clear();
    this.#toRetry.clear();
    for (const id of [...this.#ephemeral.keys()]) this.#settleEphemeral(id, why);
    // A rejected publish that is sent again would follow newer ones that may be in the log. The application decides.
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

  /** Settle everything: there will be no further connection for now. @param {Error} why */
  fail(why) {
    for (const publish of [...this.#sent.values()]) this.#settleUnknown(publish, why.message);
    for (const { settler } of [...this.#rejectedByDrain, ...this.#unsent]) this.#host.settle(settler, why);
    this.#rejectedByDrain = [];
    this.#unsent = [];
  }

  // Messages of the broker

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

  /** @param {number} id @param {RefusedError} reason @returns {boolean} whether the request is one of these */
  refused(id, reason) {
    if (this.#settleEphemeral(id, reason)) return true;
    const publish = this.#sent.get(id);
    if (!publish) return false;
    // An earlier try may still be published, unless it expects a message that is replaced for good.
    const certain = reason.code === 'conflict' && !publish.expectsNone;
    if ((this.#uncertain.has(id) && !certain) || reason.code === 'unknown') {
      this.#keepUncertain(publish, reason);
    } else {
      this.#remove(id);
      if (reason.code === 'shutting_down' && this.#reconnects) {
        // The message is certainly not published, and the next replica can publish it.
        this.#rejectedByDrain.push(publish);
        this.hold();
      } else {
        this.#host.settle(publish.settler, reason);
      }
    }
    this.#sendUnsent();
    return true;
  }

  /** Settle publishes from long before `moment`: the broker has replied to a request from then. @param {number} moment */
  timeOutBefore(moment) {
    for (const publish of [...this.#sent.values()]) {
      if (publish.at < moment - REPLY_TIMEOUT && !this.#toRetry.has(publish.id)) this.#settleUnknown(publish, 'the broker does not answer');
    }
    this.#sendUnsent();
  }

  // Helpers

  /** Handle an error that leaves the outcome uncertain: only another try can tell. @param {Publish} publish @param {RefusedError} reason */
  #keepUncertain(publish, reason) {
    const { id } = publish;
    this.#uncertain.add(id);
    if (reason.code === 'shutting_down' && this.#reconnects) {
      // The next replica can tell.
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

  /** Send the uncertain publishes again that wait for a retry on this connection. */
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

  /** Send an uncertain publish again under its id, unless the broker cannot know its outcome any more. @param {Publish} publish @param {Connection} connection */
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

  /** Send the unsent publishes, unless they are paused or an outcome is uncertain. */
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
      // A publish that was rejected and is sent again gets a new id: the old one stays rejected.
      const id = (publish.id = this.#host.nextId());
      Object.assign(publish, { after: connection.head, epoch: connection.epoch, tries: 1, at: this.#host.timers.now });
      this.#sent.set(id, publish);
      connection.sendText(`{"type":"publish","id":${id},${publish.body}`);
    }
    if (sent) this.#unsent = this.#unsent.slice(sent);
  }

  /** End a publish whose outcome cannot be found out. @param {Publish} publish @param {string} why */
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
 * The error for a body over the size limit, or undefined: the broker would close the connection.
 *
 * @param {string} body @param {{message_size?: number}} limits
 */
export function sizeError(body, { message_size: size = 65_536 }) {
  if (encoder.encode(body).length > size - REQUEST_OVERHEAD) return new RefusedError('too_large', `a message may have at most ${size} bytes`);
}
