/**
 * One subscription at the broker, and the notifications of its subscribers.
 *
 * @module
 */

import { RefusedError, RETRYABLE } from './errors.js';

/** @typedef {import('./core.js').Settler} Settler */
/** @typedef {import('./connection.js').Connection} Connection */
/** @typedef {import('./connection.js').IncomingStream} IncomingStream */
/** @typedef {import('./subscriber.js').Subscriber} Subscriber */

/** The pause before a request is sent again, in milliseconds. */
export const RETRY_PAUSE = 500;
export const MAX_RETRY_PAUSE = 10_000;

/**
 * The notifications of a subscriber: `started`, `message`, `gap`, `live`, `ended`; of a feed also `snapshot`, its whole state,
 * and `change`, that of a member.
 *
 * @typedef {'started' | 'message' | 'gap' | 'live' | 'ended' | 'snapshot' | 'change'} What
 *
 * @typedef {object} Notifier
 * @property {(subscriber: Subscriber, what: What, value: any) => void} notify
 * @property {(event: string, value: any) => void} emit
 *
 * @typedef {import('./in_flight_publishes.js').Host & Notifier & {requests: import('./in_flight_requests.js').InFlightRequests}} Host
 */

/**
 * @typedef {object} Request
 * @property {number} id
 * @property {Connection} connection
 * @property {number} at when it was sent
 * @property {number | undefined} since
 * @property {string | undefined} epoch
 * @property {boolean} retained whether it requested the retained messages
 */

/** One subscription at the broker. It outlives its connections. */
export class SharedSubscription {
  /** @type {Set<Subscriber>} */
  subscribers = new Set();
  /** The stream on which it arrives. @type {IncomingStream | undefined} */
  incoming;
  /** The newest `subscribe`, while it has no reply. @type {Request | undefined} */
  request;
  /** The ids of each `subscribe` for which the broker may hold it: accepted, or without a reply. @type {Set<number>} */
  heldIds = new Set();
  /** Whether it has caught up. */
  live = false;
  /** Whether it was requested at a cursor of another epoch and has not reached the present one: a gap may come. */
  crossing = false;
  /** `seq`: complete up to here on its stream. `head`: the position of the replica at its reply. */
  seq = 0;
  head = 0;
  /** How often in a row the broker could not serve it. */
  tries = 0;
  stream = false;
  datagrams = false;

  /** @param {string} pattern */
  constructor(pattern) {
    this.pattern = pattern;
  }

  /**
   * The broker has accepted a request, on a stream. Returns what its subscribers can follow.
   *
   * @param {{id: number, seq: number}} reply @param {IncomingStream} incoming @param {Request} request
   * @returns {import('./subscriber.js').Accepted}
   */
  accept({ id, seq }, incoming, { since, epoch, retained }) {
    // With `retained` the broker continues where the subscription is. A stream of its own may still bring what is before.
    const continued = retained && since === undefined && this.incoming === incoming && !incoming.own;
    this.request = undefined;
    this.heldIds = new Set([id]);
    this.tries = 0;
    this.incoming = incoming;
    if (incoming.own) incoming.subscription = this;
    this.live = since === undefined && !retained;
    this.crossing = since !== undefined && epoch !== incoming.epoch;
    this.seq = since ?? seq;
    // A lagging replica sends from `since` on, not from its own position.
    this.head = this.crossing ? seq : Math.max(seq, this.seq);
    return { since, epoch, seq, present: incoming.epoch, continued };
  }

  /** Announce a gap to the subscribers that miss something by it. @param {any} reply @param {Notifier} host */
  gap(reply, host) {
    const { pattern, epoch, reason, to } = reply;
    this.seq = this.head = to;
    for (const subscriber of this.active) {
      const missing = subscriber.gapFor(reply);
      if (!missing) continue;
      const gap = { pattern, ...missing, epoch, reason };
      notify(host, subscriber, 'gap', gap);
      host.emit('gap', gap);
    }
  }

  /** A part of a snapshot, or a change of members. @param {any} object @param {Notifier} host */
  feed(object, host) {
    for (const subscriber of this.active) {
      for (const [what, value] of subscriber.receive(object)) host.notify(subscriber, what, value);
    }
  }

  /** The subscribers that receive its messages. */
  get active() {
    return [...this.subscribers].filter(({ phase }) => phase === 'active');
  }

  get attached() {
    return [...this.subscribers].filter((subscriber) => subscriber.attached);
  }

  /** The snapshots that its subscribers need. @returns {{retained?: true, presence?: true}} */
  get needs() {
    return Object.assign({}, ...this.attached.map(({ needs }) => needs));
  }

  /**
   * The cursor to request: the lowest one of its subscribers in the present epoch.
   *
   * Subscribers of another epoch are requested one by one, when the subscription has caught up: only a cursor of their own
   * shows the broker which gap they have.
   *
   * @param {Connection} connection @returns {{since: number | undefined, epoch: string | undefined}}
   */
  nextCursor(connection) {
    const { attached } = this;
    const placed = attached.filter(({ cursor }) => cursor !== undefined);
    for (const subscriber of placed) if (!subscriber.epoch && connection.epoch) subscriber.epoch = connection.epoch;
    const here = this.incoming?.connection === connection;
    const waiting = placed.find(({ phase }) => phase === 'requested');
    const heard = placed.find(({ phase }) => phase === 'active');
    const first = here && this.live ? waiting ?? heard : heard ?? waiting;
    // A snapshot comes without `since` only. The broker then continues where the subscription is.
    const snapshot = here && !waiting && attached.some(({ needsSnapshot }) => needsSnapshot);
    if (!first || snapshot) return { since: undefined, epoch: undefined };
    const { epoch } = first;
    const together = epoch === connection.epoch ? placed.filter((subscriber) => subscriber.epoch === epoch) : [first];
    const since = Math.min(...together.map(({ cursor }) => Number(cursor)));
    // A new subscriber, or a snapshot, cannot start at a cursor that the log has not reached.
    const starting = attached.some(({ started, cursor, needsSnapshot }) => needsSnapshot || (!started && cursor === undefined));
    return { since: since > connection.head && starting ? undefined : since, epoch };
  }
}

/**
 * Notify a subscriber, after the history that it still waits for.
 *
 * @param {Notifier} host @param {Subscriber} subscriber @param {What} what @param {any} value
 */
export function notify(host, subscriber, what, value) {
  if (subscriber.buffered) subscriber.buffered.push([what, value]);
  else host.notify(subscriber, what, value);
}

/**
 * Fetch the history before the start of a subscriber in pages, then deliver it, and what has arrived meanwhile.
 *
 * @param {Host} host @param {Subscriber} subscriber @param {number} wanted @param {number} before
 */
export function fetchHistory(host, subscriber, wanted, before) {
  /** @type {Settler} */
  const done = (error, page) => {
    if (subscriber.phase === 'ended') return;
    if (error instanceof RefusedError && RETRYABLE.has(error.code)) {
      host.timers.set(`past ${host.nextId()}`, RETRY_PAUSE, () => fetchHistory(host, subscriber, wanted, before));
      return;
    }
    const messages = page?.messages ?? [];
    subscriber.history.unshift(...messages);
    if (error) host.emit('error', error);
    else if (page.more && messages.length && messages.length < wanted) {
      return fetchHistory(host, subscriber, wanted - messages.length, messages[0].seq);
    }
    const { history, buffered, epoch } = subscriber;
    subscriber.history = [];
    subscriber.buffered = undefined;
    for (const message of history) host.notify(subscriber, 'message', { message, epoch });
    for (const [what, value] of buffered ?? []) host.notify(subscriber, what, value);
  };
  host.requests.history(subscriber.subscription.pattern, wanted, before, done, true);
}
