/**
 * What one handler is owed of a subscription: everything that matches after its cursor, once, in order.
 *
 * @module
 */

/** @typedef {import('./shared_subscription.js').SharedSubscription} SharedSubscription */
/** @typedef {{since?: number | undefined, epoch?: string | undefined, last?: number | undefined}} Start */

/**
 * One handler of a pattern. Several share one subscription on the wire; each drops what is not above its own cursor.
 *
 * Phases: `requested` (the broker has not agreed to send from its cursor), `active` (it gets what the subscription brings),
 * `paused` (its queue is full: the log keeps what comes), `ended`.
 */
export class Subscriber {
  /** @type {'requested' | 'active' | 'paused' | 'ended'} */
  phase = 'requested';
  /** Complete up to here; undefined: from whenever the broker agrees. @type {number | undefined} */
  cursor;
  /** @type {string | undefined} */
  epoch;
  /** Whether the broker has ever agreed. */
  started = false;
  /** Whether it has caught up. */
  live = false;
  /** The client_id that it belongs to, once it has started. @type {string | null | undefined} */
  owner;
  /** Where it has started. */
  start = 0;
  /** How many messages of the past it still has to ask for. */
  last;
  /** Those of the past, newest page last, while they are fetched. @type {any[]} */
  history = [];
  /** What has come meanwhile; undefined unless it waits for its past. @type {any[] | undefined} */
  buffered;

  /**
   * @param {SharedSubscription} subscription
   * @param {Start} start
   * @param {any} owner what the effects about it are for
   */
  constructor(subscription, { since, epoch, last }, owner) {
    this.subscription = subscription;
    this.cursor = since;
    this.epoch = since === undefined ? undefined : epoch;
    this.last = last;
    this.target = owner;
  }

  get attached() {
    return this.phase === 'requested' || this.phase === 'active';
  }

  /**
   * Whether the broker sends what it is owed, when it was asked for everything after `since` of `epoch` and sends that of
   * `present`. Where these are two epochs, the broker has told of the gap from there, and not from anywhere else.
   *
   * @param {number} since @param {string | undefined} epoch @param {string} present
   */
  isCovered(since, epoch, present) {
    const cursor = Number(this.cursor);
    return this.epoch === epoch && (epoch === present ? cursor >= since : cursor === since);
  }

  /** The broker sends from now on; `seq` and `epoch` are where it stands. @param {number} seq @param {string} epoch */
  activate(seq, epoch) {
    this.phase = 'active';
    if (!this.started) this.start = this.cursor ?? seq;
    this.cursor ??= seq;
    this.epoch ??= epoch;
  }

  /**
   * Whether a message with this seq is new to it; its cursor is there then.
   *
   * A message that no gap precedes says that what came before stands in its epoch as it stood in the subscriber's own.
   *
   * @param {number} seq @param {string} epoch
   */
  isNew(seq, epoch) {
    if (seq <= /** @type {number} */ (this.cursor)) return false;
    this.cursor = seq;
    this.epoch = epoch;
    return true;
  }

  /** It is complete up to there. @param {number} seq @param {string} epoch */
  moveTo(seq, epoch) {
    this.cursor = epoch === this.epoch ? Math.max(seq, this.cursor ?? 0) : seq;
    this.epoch = epoch;
  }

  /**
   * Something may be missing from what the subscription brings. Returns what of that is missing here.
   *
   * @param {{from: number, to: number, epoch: string}} gap @returns {{from: number, to: number} | undefined}
   */
  gapFor({ from, to, epoch }) {
    const same = epoch === this.epoch;
    if (same && to <= Number(this.cursor)) return undefined;
    const first = same ? Math.max(from, Number(this.cursor) + 1) : from;
    this.moveTo(to, epoch);
    return { from: first, to };
  }
}
