/**
 * The subscriptions of one client, which outlive its connections: their requests to the broker, and its replies.
 *
 * All handlers of a pattern are subscribers of one subscription at the broker. It receives from one stream: that of the
 * newest accepted `subscribe`. Only the newest request counts, so a late reply, or one from a replaced connection, does
 * not affect it. The request names the lowest cursor of its subscribers, so nothing is missing in between, and each
 * subscriber drops what is not above its own cursor.
 *
 * @module
 */

import { ANOTHER_CLIENT, RefusedError, RETRYABLE } from './errors.js';
import { MAX_RETRY_PAUSE, RETRY_PAUSE, SharedSubscription, fetchHistory, notify } from './shared_subscription.js';
import { REPLY_TIMEOUT } from './in_flight_publishes.js';
import { Subscriber } from './subscriber.js';

/** @typedef {import('./connection.js').Connection} Connection */
/** @typedef {import('./connection.js').IncomingStream} IncomingStream */
/** @typedef {import('./core.js').Settler} Settler */
/** @typedef {import('./subscriber.js').Start} Start */

const ignore = () => {};

export class SubscriptionManager {
  #host;
  /** The connection for new requests. @type {Connection | undefined} */
  #connection;
  /** The connection before it during a move, which may be needed again. @type {Connection | undefined} */
  #previous;
  /** @type {Map<string, SharedSubscription>} */
  #byPattern = new Map();
  /** @type {Map<number, SharedSubscription>} */
  #requests = new Map();
  /** The settlers that wait for `unsubscribed`. @type {Map<number, Settler>} */
  #unsubscribing = new Map();
  /** @type {Set<SharedSubscription>} */
  #toRetry = new Set();

  /** @param {import('./shared_subscription.js').Host} host */
  constructor(host) {
    this.#host = host;
  }

  /** Whether a `subscribe` has no reply. */
  get awaitingReply() {
    return this.#requests.size + this.#toRetry.size > 0;
  }

  /**
   * @param {string} pattern @param {Start & {stream?: boolean, datagrams?: boolean}} options
   * @param {any} owner the target of its notifications
   * @param {new (...details: ConstructorParameters<typeof Subscriber>) => Subscriber} [Kind] @returns {Subscriber}
   */
  add(pattern, { stream = false, datagrams = false, ...start }, owner, Kind = Subscriber) {
    let subscription = this.#byPattern.get(pattern);
    if (!subscription) this.#byPattern.set(pattern, (subscription = new SharedSubscription(pattern)));
    const subscriber = new Kind(subscription, start, owner);
    subscription.subscribers.add(subscriber);
    const more = (stream && !subscription.stream) || (datagrams && !subscription.datagrams) || subscriber.needs !== undefined;
    subscription.stream ||= stream;
    subscription.datagrams ||= datagrams;
    const { request, incoming } = subscription;
    // A request at a cursor that the log has not reached covers no subscriber without a cursor.
    const ahead = request && Number(request.since ?? 0) > request.connection.head;
    if (subscriber.cursor === undefined && incoming && !subscription.crossing && subscription.seq <= incoming.connection.head && !more && !ahead) {
      // It starts at the position of the subscription, or of the replica if that has not caught up.
      this.#start(subscriber, Math.max(subscription.seq, subscription.head), incoming.epoch, incoming.connection);
      if (subscription.live) this.#becomeLive(subscriber);
    } else if (subscriber.cursor !== undefined || !request || more || ahead) {
      this.#sendSubscribe(subscription);
    }
    return subscriber;
  }

  /** End a subscriber for the application. @param {Subscriber} subscriber @param {Settler} settler settled when the broker has replied */
  remove(subscriber, settler) {
    const { subscription } = subscriber;
    const attached = subscriber.attached;
    this.#end(subscriber, undefined);
    if (attached && !subscription.attached.length) return this.#sendUnsubscribe(subscription, settler);
    // The others need less of the broker.
    if (attached && subscriber.needs) this.#sendSubscribe(subscription);
    this.#host.settle(settler, undefined);
  }

  /** Pause a subscriber. @param {Subscriber} subscriber */
  pause(subscriber) {
    if (!subscriber.attached) return;
    subscriber.phase = 'paused';
    if (!subscriber.subscription.attached.length) this.#sendUnsubscribe(subscriber.subscription);
  }

  /** Resume a subscriber at its cursor. @param {Subscriber} subscriber */
  unpause(subscriber) {
    if (subscriber.phase !== 'paused') return;
    subscriber.phase = 'requested';
    subscriber.live = false;
    this.#sendSubscribe(subscriber.subscription);
  }

  /** End all subscribers that started under another client_id. @param {string | null} clientId */
  endForeign(clientId) {
    for (const subscriber of this.#subscribers()) {
      if (subscriber.owner === undefined || subscriber.owner === clientId) continue;
      this.#reject(subscriber, new RefusedError('unauthorized', ANOTHER_CLIENT));
      if (!subscriber.subscription.attached.length) this.#sendUnsubscribe(subscriber.subscription);
    }
  }

  /** End all subscribers. @param {Error} why */
  endAll(why) {
    for (const subscriber of this.#subscribers()) this.#end(subscriber, why);
  }

  // Changes of the connection

  /** Resume all subscriptions on a new connection. The one before it delivers until the reply. @param {Connection} connection */
  resume(connection) {
    this.#forgetRequests();
    this.#previous = this.#connection;
    this.#connection = connection;
    for (const subscription of this.#byPattern.values()) if (subscription.attached.length) this.#sendSubscribe(subscription);
  }

  /** Detach the subscriptions of a lost connection. They wait for the next one. @param {Connection} connection */
  lose(connection) {
    for (const subscription of this.#byPattern.values()) if (subscription.incoming?.connection === connection) this.#detach(subscription);
    if (this.#previous === connection) this.#previous = undefined;
    if (this.#connection !== connection) return;
    this.#connection = undefined;
    this.#forgetRequests();
  }

  // Messages of the broker

  /** @param {any} reply @param {IncomingStream} incoming */
  subscribed(reply, incoming) {
    const subscription = this.#takeRequest(reply.id);
    if (!subscription?.request) return;
    const moved = subscription.incoming?.connection !== incoming.connection;
    const accepted = subscription.accept(reply, incoming, subscription.request);
    for (const subscriber of subscription.attached) {
      const fresh = subscriber.phase === 'requested';
      if (subscriber.follow(accepted)) {
        if (moved || fresh) subscriber.live = false;
        this.#start(subscriber, subscription.head, incoming.epoch, incoming.connection);
        if (subscription.live) this.#becomeLive(subscriber);
      } else {
        // Its cursor is of another epoch, or it has none: it is requested when this subscription has caught up.
        subscriber.phase = 'requested';
      }
    }
    if (subscription.live) this.#subscribeWaiting(subscription);
  }

  /** @param {any} reply @param {Connection} connection */
  unsubscribed(reply, connection) {
    if (reply.id !== undefined) {
      this.#host.settle(this.#unsubscribing.get(reply.id) ?? ignore, undefined);
      this.#unsubscribing.delete(reply.id);
      return;
    }
    // Its own stream was not read for too long (a page may be frozen): it resumes at its cursor.
    const subscription = this.#byPattern.get(reply.pattern);
    if (subscription?.incoming?.connection !== connection) return;
    this.#detach(subscription);
    if (connection === this.#connection) subscription.heldIds = new Set(subscription.request && [subscription.request.id]);
    if (connection === this.#connection && !subscription.request && subscription.attached.length) this.#sendSubscribe(subscription);
  }

  /** @param {number} id @param {RefusedError} reason @returns {boolean} whether the request is one of these */
  refused(id, reason) {
    if (this.#unsubscribing.has(id)) {
      this.unsubscribed({ id }, /** @type {any} */ (undefined));
      return true;
    }
    const subscription = this.#takeRequest(id);
    if (!subscription) return false;
    subscription.request = undefined;
    subscription.heldIds.delete(id);
    if (RETRYABLE.has(reason.code)) {
      this.#toRetry.add(subscription);
      const pause = Math.min(MAX_RETRY_PAUSE, RETRY_PAUSE * 2 ** Math.min(subscription.tries++, 10));
      if (!this.#host.timers.has('retry subscriptions')) this.#host.timers.set('retry subscriptions', pause, () => this.#retry());
      return true;
    }
    for (const subscriber of [...subscription.subscribers]) this.#reject(subscriber, reason);
    // A rejected `subscribe` leaves the subscription in place that it was to replace.
    if (subscription.heldIds.size) this.#sendUnsubscribe(subscription);
    return true;
  }

  /** Whether a request from long before `moment` has no reply. @param {number} moment */
  stuckSince(moment) {
    return [...this.#requests.values()].some(({ request }) => request !== undefined && request.at < moment - REPLY_TIMEOUT);
  }

  /** @param {any} reply @param {IncomingStream} incoming */
  revoked(reply, incoming) {
    const subscription = this.#route(reply.pattern, incoming);
    if (!subscription) return;
    const reason = new RefusedError('revoked', 'the permission was withdrawn');
    // It is requested again, here or on the next connection.
    if (subscription.request) this.#sendUnsubscribe(subscription);
    for (const subscriber of [...subscription.subscribers]) this.#end(subscriber, reason);
    this.#detach(subscription);
    this.#host.emit('revoked', { pattern: reply.pattern, seq: reply.seq });
  }

  /** @param {any} message @param {IncomingStream} incoming */
  message(message, incoming) {
    const { seq, pattern } = message;
    const subscription = incoming.subscription ?? this.#byPattern.get(pattern);
    if (!subscription?.incoming) return;
    if (seq === undefined) {
      // A datagram belongs to no stream.
      if (subscription.incoming.connection !== incoming.connection) return;
      for (const subscriber of subscription.active) notify(this.#host, subscriber, 'message', { message, epoch: '' });
      return;
    }
    if (subscription.incoming !== incoming) return;
    subscription.seq = seq;
    for (const subscriber of subscription.active) {
      if (subscriber.isNew(seq, incoming.epoch, message)) notify(this.#host, subscriber, 'message', { message, epoch: incoming.epoch });
    }
  }

  /** @param {any} reply @param {IncomingStream} incoming */
  live(reply, incoming) {
    const subscription = this.#route(reply.pattern, incoming);
    if (!subscription) return;
    subscription.live = true;
    subscription.crossing = false;
    subscription.seq = reply.seq;
    subscription.feed(reply, this.#host);
    for (const subscriber of subscription.active) {
      subscriber.moveTo(reply.seq, incoming.epoch);
      this.#becomeLive(subscriber);
    }
    this.#subscribeWaiting(subscription);
  }

  /** @param {any} reply @param {IncomingStream} incoming */
  head(reply, incoming) {
    for (const subscription of incoming.own ? [incoming.subscription] : this.#byPattern.values()) {
      if (subscription?.incoming !== incoming || !subscription.live) continue;
      subscription.seq = reply.seq;
      for (const subscriber of subscription.active) subscriber.moveTo(reply.seq, reply.epoch);
    }
  }

  /** @param {any} reply @param {IncomingStream} incoming */
  gap(reply, incoming) {
    this.#route(reply.pattern, incoming)?.gap(reply, this.#host);
  }

  /** A part of a snapshot, or a change of members. @param {any} object @param {IncomingStream} incoming */
  feed(object, incoming) {
    this.#route(object.pattern, incoming)?.feed(object, this.#host);
  }

  // Helpers

  #subscribers() {
    return [...this.#byPattern.values()].flatMap((subscription) => [...subscription.subscribers]);
  }

  /** The subscription of a pattern, if it arrives on this stream. @param {string} pattern @param {IncomingStream} incoming */
  #route(pattern, incoming) {
    const subscription = incoming.subscription ?? this.#byPattern.get(pattern);
    return subscription?.incoming === incoming ? subscription : undefined;
  }

  /** Request what its subscribers are missing. @param {SharedSubscription} subscription */
  #sendSubscribe(subscription) {
    const connection = this.#connection;
    if (!connection) return;
    this.#toRetry.delete(subscription);
    const { since, epoch } = subscription.nextCursor(connection);
    const id = this.#host.nextId();
    if (subscription.request) this.#requests.delete(subscription.request.id);
    subscription.heldIds.add(id);
    const { needs } = subscription;
    subscription.request = { id, connection, at: this.#host.timers.now, since, epoch, retained: needs.retained === true };
    this.#requests.set(id, subscription);
    connection.send({
      type: 'subscribe',
      pattern: subscription.pattern,
      ...(since !== undefined && { since, epoch }),
      ...(subscription.stream && { stream: true }),
      ...(subscription.datagrams && { datagrams: true }),
      ...needs,
      id,
    });
  }

  /** @param {SharedSubscription} subscription */
  #subscribeWaiting(subscription) {
    if (!subscription.request && subscription.attached.some(({ phase }) => phase === 'requested')) this.#sendSubscribe(subscription);
  }

  #retry() {
    for (const subscription of [...this.#toRetry]) if (subscription.attached.length) this.#sendSubscribe(subscription);
    this.#toRetry.clear();
  }

  /** End the subscription at the broker, for now or for good. @param {SharedSubscription} subscription @param {Settler} settler */
  #sendUnsubscribe(subscription, settler = ignore) {
    const connection = this.#connection;
    const held = subscription.heldIds.size > 0;
    if (subscription.request) this.#requests.delete(subscription.request.id);
    subscription.request = undefined;
    subscription.heldIds.clear();
    this.#toRetry.delete(subscription);
    this.#detach(subscription);
    const { pattern } = subscription;
    this.#previous?.send({ type: 'unsubscribe', pattern, id: this.#host.nextId() });
    if (connection && held) {
      const id = this.#host.nextId();
      this.#unsubscribing.set(id, settler);
      connection.send({ type: 'unsubscribe', pattern, id });
    } else {
      this.#host.settle(settler, undefined);
    }
  }

  /** Detach a subscription from its stream. @param {SharedSubscription} subscription */
  #detach(subscription) {
    if (subscription.incoming?.subscription === subscription) subscription.incoming.subscription = undefined;
    subscription.incoming = undefined;
    subscription.live = false;
  }

  /** Take the subscription to which a reply belongs. There is one reply to each request. @param {number} id */
  #takeRequest(id) {
    const subscription = this.#requests.get(id);
    this.#requests.delete(id);
    return subscription;
  }

  #forgetRequests() {
    for (const subscription of this.#requests.values()) subscription.request = undefined;
    for (const subscription of this.#byPattern.values()) subscription.heldIds.clear();
    this.#requests.clear();
    this.#toRetry.clear();
    this.#host.timers.cancel('retry subscriptions');
    for (const settler of this.#unsubscribing.values()) this.#host.settle(settler, undefined);
    this.#unsubscribing.clear();
  }

  /** @param {Subscriber} subscriber @param {number} seq @param {string} epoch @param {Connection} connection */
  #start(subscriber, seq, epoch, connection) {
    subscriber.activate(seq, epoch);
    if (subscriber.started) return;
    subscriber.started = true;
    subscriber.owner = connection.clientId;
    this.#host.notify(subscriber, 'started', { cursor: subscriber.cursor, epoch: subscriber.epoch, owner: subscriber.owner });
    if (subscriber.last !== undefined) subscriber.buffered = [];
  }

  /** @param {Subscriber} subscriber */
  #becomeLive(subscriber) {
    if (subscriber.live) return;
    subscriber.live = true;
    if (subscriber.last !== undefined) {
      // Only now does the replica certainly have everything below its cursor.
      fetchHistory(this.#host, subscriber, subscriber.last, subscriber.start + 1);
      subscriber.last = undefined;
    }
    notify(this.#host, subscriber, 'live', undefined);
  }

  /** The broker has rejected it. @param {Subscriber} subscriber @param {RefusedError} reason */
  #reject(subscriber, reason) {
    const { started, cursor, subscription } = subscriber;
    this.#end(subscriber, reason);
    if (!started) return;
    this.#host.emit('error', reason);
    if (reason.code === 'unauthorized') this.#host.emit('revoked', { pattern: subscription.pattern, seq: cursor ?? 0 });
  }

  /** End a subscriber. @param {Subscriber} subscriber @param {Error | undefined} why undefined: the application ended it */
  #end(subscriber, why) {
    if (subscriber.phase === 'ended') return;
    const { subscription } = subscriber;
    subscriber.phase = 'ended';
    subscriber.buffered = undefined;
    subscription.subscribers.delete(subscriber);
    if (!subscription.subscribers.size && this.#byPattern.get(subscription.pattern) === subscription) this.#byPattern.delete(subscription.pattern);
    this.#host.notify(subscriber, 'ended', why);
  }
}
