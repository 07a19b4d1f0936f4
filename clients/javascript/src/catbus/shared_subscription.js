/**
 * One subscription on the wire, and what its subscribers are told.
 *
 * @module
 */

import { RefusedError, RETRYABLE } from './errors.js';

/** @typedef {import('./core.js').Settler} Settler */
/** @typedef {import('./connection.js').Connection} Connection */
/** @typedef {import('./connection.js').IncomingStream} IncomingStream */
/** @typedef {import('./subscriber.js').Subscriber} Subscriber */

/** How long to wait before the broker is asked again, in milliseconds. */
export const RETRY_PAUSE = 500;

/**
 * What happens to a subscriber: `started`, `message`, `gap`, `live`, `ended`.
 *
 * @typedef {'started' | 'message' | 'gap' | 'live' | 'ended'} What
 *
 * @typedef {object} Notifier
 * @property {(subscriber: Subscriber, what: What, value: any) => void} notify
 * @property {(event: string, value: any) => void} emit
 *
 * @typedef {import('./in_flight_publishes.js').Host & Notifier & {requests: import('./in_flight_requests.js').InFlightRequests}} Host
 */

/** One subscription on the wire, whatever connection it has at the moment. */
export class SharedSubscription {
  /** @type {Set<Subscriber>} */
  subscribers = new Set();
  /** Where it is heard. @type {IncomingStream | undefined} */
  incoming;
  /** The newest `subscribe`, while it has no answer. @type {{id: number, connection: Connection, at: number, since: number | undefined, epoch: string | undefined} | undefined} */
  request;
  /** Whether the broker has said that it has caught up. */
  live = false;
  /** Whether it was asked for from a place in another epoch, and is on its way into the present one: a gap may come. */
  crossing = false;
  /** Complete up to here, on its incoming; and where the replica was when it agreed. */
  seq = 0;
  head = 0;
  /** How often in a row the broker could not take it up. */
  tries = 0;
  stream = false;
  datagrams = false;

  /** @param {string} pattern */
  constructor(pattern) {
    this.pattern = pattern;
  }

  /** Those that get what it brings. */
  get active() {
    return [...this.subscribers].filter(({ phase }) => phase === 'active');
  }

  get attached() {
    return [...this.subscribers].filter((subscriber) => subscriber.attached);
  }

  /**
   * From where it has to be asked for: after the lowest cursor of its subscribers in the present epoch.
   *
   * Readers in another epoch are asked for one by one, when the subscription has caught up: only a cursor of their own
   * tells the broker which gap they have.
   *
   * @param {Connection} connection @returns {{since: number | undefined, epoch: string | undefined}}
   */
  nextCursor(connection) {
    const { attached } = this;
    const placed = attached.filter(({ cursor }) => cursor !== undefined);
    for (const subscriber of placed) if (!subscriber.epoch && connection.epoch) subscriber.epoch = connection.epoch;
    const waiting = placed.find(({ phase }) => phase === 'requested');
    const heard = placed.find(({ phase }) => phase === 'active');
    const caughtUp = this.incoming?.connection === connection && this.live;
    const first = caughtUp ? waiting ?? heard : heard ?? waiting;
    if (!first) return { since: undefined, epoch: undefined };
    const { epoch } = first;
    const together = epoch === connection.epoch ? placed.filter((subscriber) => subscriber.epoch === epoch) : [first];
    const since = Math.min(...together.map(({ cursor }) => Number(cursor)));
    // A cursor that the log has not reached is no place for another one to start from.
    return { since: since > connection.head && placed.length < attached.length ? undefined : since, epoch };
  }
}

/**
 * Tell a subscriber something, after the messages of the past that it still waits for.
 *
 * @param {Notifier} host @param {Subscriber} subscriber @param {What} what @param {any} value
 */
export function notify(host, subscriber, what, value) {
  if (subscriber.buffered) subscriber.buffered.push([what, value]);
  else host.notify(subscriber, what, value);
}

/**
 * Get what was published before a subscriber began, a page at a time; then tell it that, and what has come meanwhile.
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
