/**
 * The channels of which this client is a member. It joins them again on each connection.
 *
 * A session is a member of a channel once, so the handles of one channel share a membership: the newest info counts, and the
 * last handle that leaves ends it.
 *
 * @module
 */

import { ANOTHER_CLIENT, RefusedError, RETRYABLE } from './errors.js';
import { REPLY_TIMEOUT } from './in_flight_publishes.js';
import { MAX_RETRY_PAUSE, RETRY_PAUSE } from './shared_subscription.js';

/** @typedef {import('./connection.js').Connection} Connection */
/** @typedef {import('./core.js').Settler} Settler */

/**
 * One handle of a membership: its info in JSON, if it has one, the last one that the broker has accepted, and the target of its
 * notification `ended`.
 *
 * @typedef {{channel: string, info: string | undefined, accepted?: {info: string | undefined}, target: any}} Holder
 *
 * @typedef {object} Membership
 * @property {string} channel
 * @property {Holder[]} holders the one with the newest info last
 * @property {Waiting[]} waiting those that wait for the next `join`
 * @property {number | undefined} newest the id of the newest `join`, while it has no reply
 * @property {string | undefined} sent its info
 * @property {boolean} here whether the present session is a member
 * @property {string | null | undefined} owner the client_id under which it was last accepted
 * @property {number} tries
 *
 * @typedef {{holder: Holder, settler: Settler}} Waiting
 *
 * @typedef {{membership: Membership, holder: Holder, info: string | undefined, waiting: Waiting[], at: number}} Request
 *
 * @typedef {import('./in_flight_publishes.js').Host & {notify: (holder: any, what: 'ended', value: Error) => void}} Host
 */

export class Memberships {
  #host;
  /** @type {Connection | undefined} */
  #connection;
  /** @type {Map<string, Membership>} */
  #byChannel = new Map();
  /** Each `join` without a reply. @type {Map<number, Request>} */
  #requests = new Map();
  /** The settlers that wait for `left`. @type {Map<number, Settler>} */
  #leaving = new Map();

  /** @param {Host} host */
  constructor(host) {
    this.#host = host;
  }

  /** @param {Holder} holder @param {Settler} settler settled when the broker has accepted it */
  join(holder, settler) {
    const { channel } = holder;
    let membership = this.#byChannel.get(channel);
    if (!membership) {
      const most = this.#connection?.limits.joined_channels ?? Infinity;
      if (this.#byChannel.size >= most) {
        const why = new RefusedError('limit', `the broker allows a client to join ${most} channels, and not more`);
        this.#host.settle(settler, why);
        return this.#host.notify(holder, 'ended', why);
      }
      membership = { channel, holders: [], waiting: [], newest: undefined, sent: undefined, here: false, owner: undefined, tries: 0 };
      this.#byChannel.set(channel, membership);
    }
    membership.holders.push(holder);
    membership.waiting.push({ holder, settler });
    this.#send(membership);
  }

  /** @param {Holder} holder @param {string | undefined} info @param {Settler} settler */
  update(holder, info, settler) {
    const membership = this.#byChannel.get(holder.channel);
    if (!membership?.holders.includes(holder)) return this.#host.settle(settler, new RefusedError('closed', 'this is no member any more'));
    holder.info = info;
    membership.holders = [...membership.holders.filter((each) => each !== holder), holder];
    membership.waiting.push({ holder, settler });
    this.#send(membership);
  }

  /** @param {Holder} holder @param {Settler} settler settled when the broker has replied */
  leave(holder, settler) {
    const membership = this.#byChannel.get(holder.channel);
    const others = membership?.holders.filter((each) => each !== holder) ?? [];
    if (!membership || others.length === membership.holders.length) return this.#host.settle(settler, undefined);
    membership.holders = others;
    if (others.length) {
      if (others.at(-1)?.info !== membership.sent) this.#send(membership);
      return this.#host.settle(settler, undefined);
    }
    this.#quit(membership, new RefusedError('closed', 'the channel was left'), settler);
  }

  /** End the memberships that were accepted under another client_id. @param {string | null} clientId */
  endForeign(clientId) {
    for (const membership of [...this.#byChannel.values()]) {
      if (membership.owner !== undefined && membership.owner !== clientId) this.#end(membership, new RefusedError('unauthorized', ANOTHER_CLIENT));
    }
  }

  /** @param {Error} why */
  endAll(why) {
    for (const membership of [...this.#byChannel.values()]) this.#end(membership, why);
  }

  // Changes of the connection

  /** @param {Connection} connection */
  resume(connection) {
    this.#disconnect();
    this.#connection = connection;
    for (const membership of this.#byChannel.values()) this.#send(membership);
  }

  /** @param {Connection} connection */
  lose(connection) {
    if (this.#connection === connection) this.#disconnect();
  }

  // Messages of the broker

  /** @param {number} id */
  joined(id) {
    const request = this.#takeRequest(id);
    if (!request) return;
    const { membership, holder, info, waiting } = request;
    Object.assign(membership, { here: true, tries: 0, owner: this.#connection?.clientId ?? null });
    holder.accepted = { info };
    for (const { settler } of waiting) this.#host.settle(settler, undefined);
  }

  /** @param {{id?: number, channel: string}} reply @param {Connection} connection */
  left({ id, channel }, connection) {
    if (id !== undefined) return void this.refused(id, /** @type {any} */ (undefined));
    // The permission was withdrawn. A newer `join` gets a reply of its own.
    const membership = this.#byChannel.get(channel);
    if (connection !== this.#connection || !membership) return;
    membership.here = false;
    if (membership.newest === undefined) this.#end(membership, new RefusedError('revoked', 'the permission was withdrawn'));
  }

  /** @param {number} id @param {RefusedError} reason @returns {boolean} whether the request is one of these */
  refused(id, reason) {
    const leaving = this.#leaving.get(id);
    if (leaving) {
      this.#leaving.delete(id);
      this.#host.settle(leaving, undefined);
      return true;
    }
    const request = this.#takeRequest(id);
    if (!request) return false;
    const { membership, holder, info, waiting } = request;
    const { channel } = membership;
    if (RETRYABLE.has(reason.code) || reason.code === 'shutting_down') {
      membership.waiting.unshift(...waiting);
      const pause = Math.min(MAX_RETRY_PAUSE, RETRY_PAUSE * 2 ** Math.min(membership.tries++, 10));
      this.#host.timers.set(`join ${channel}`, pause, () => membership.newest === undefined && this.#send(membership));
      return true;
    }
    const later = [...this.#requests.values()].filter((each) => each.membership === membership);
    // A later info of the same handle decides.
    const own = later.find((each) => each.holder === holder);
    for (const each of waiting) {
      const next = each.holder === holder ? own : later[0] ?? membership;
      if (next) next.waiting.push(each);
      else this.#host.settle(each.settler, reason);
    }
    if (own) return true;
    if (holder.accepted && holder.accepted.info === info) this.#end(membership, reason);
    else {
      // The new info is wrong. The membership continues with the one before.
      if (holder.accepted) holder.info = holder.accepted.info;
      else this.#drop(membership, holder, reason);
      if (!membership.holders.length) this.#quit(membership, reason, () => {});
      else if (!later.length) this.#send(membership);
    }
    return true;
  }

  /** Whether a request from long before `moment` has no reply. @param {number} moment */
  stuckSince(moment) {
    return [...this.#requests.values()].some(({ at }) => at < moment - REPLY_TIMEOUT);
  }

  // Helpers

  /** @param {Membership} membership */
  #send(membership) {
    const connection = this.#connection;
    if (!connection) return;
    const { channel, waiting } = membership;
    const holder = membership.holders[membership.holders.length - 1];
    const { info } = holder;
    const id = this.#host.nextId();
    this.#host.timers.cancel(`join ${channel}`);
    this.#requests.set(id, { membership, holder, info, waiting, at: this.#host.timers.now });
    Object.assign(membership, { newest: id, sent: info, waiting: [] });
    connection.sendText(`{"type":"join","id":${id},"channel":${JSON.stringify(channel)}${info === undefined ? '' : `,"info":${info}`}}`);
  }

  /** Take the request to which a reply belongs. @param {number} id */
  #takeRequest(id) {
    const request = this.#requests.get(id);
    this.#requests.delete(id);
    if (request?.membership.newest === id) request.membership.newest = undefined;
    return request;
  }

  /** There is no session any more, and no reply from it. */
  #disconnect() {
    this.#connection = undefined;
    for (const [id, { membership, waiting }] of [...this.#requests]) {
      this.#takeRequest(id);
      membership.waiting.push(...waiting);
    }
    for (const membership of this.#byChannel.values()) {
      membership.here = false;
      this.#host.timers.cancel(`join ${membership.channel}`);
    }
    for (const settler of this.#leaving.values()) this.#host.settle(settler, undefined);
    this.#leaving.clear();
  }

  /** @param {Membership} membership @param {Error} why for those that wait */
  #forget(membership, why) {
    this.#byChannel.delete(membership.channel);
    this.#host.timers.cancel(`join ${membership.channel}`);
    const requests = [...this.#requests].filter(([, request]) => request.membership === membership);
    for (const [id] of requests) this.#takeRequest(id);
    for (const { settler } of [...requests.flatMap(([, { waiting }]) => waiting), ...membership.waiting]) this.#host.settle(settler, why);
    membership.waiting = [];
  }

  /** End a membership that has no holders any more. @param {Membership} membership @param {Error} why @param {Settler} settler */
  #quit(membership, why, settler) {
    const held = membership.here || membership.newest !== undefined;
    this.#forget(membership, why);
    if (!this.#connection || !held) return this.#host.settle(settler, undefined);
    const id = this.#host.nextId();
    this.#leaving.set(id, settler);
    this.#connection.send({ type: 'leave', channel: membership.channel, id });
  }

  /** @param {Membership} membership @param {Holder} holder @param {Error} why */
  #drop(membership, holder, why) {
    membership.holders = membership.holders.filter((each) => each !== holder);
    this.#host.notify(holder, 'ended', why);
  }

  /** @param {Membership} membership @param {Error} why */
  #end(membership, why) {
    this.#forget(membership, why);
    for (const holder of membership.holders) this.#drop(membership, holder, why);
  }
}
