/**
 * What one handler is owed of a subscription: everything that matches after its cursor, once, in order.
 *
 * @module
 */

/** @typedef {import('./feeds.js').Feed} Feed */
/** @typedef {{since?: number | undefined, epoch?: string | undefined, last?: number | undefined}} Start */

/**
 * One handler of a pattern. Several share one subscription on the wire; each drops what is not above its own cursor.
 *
 * Phases: `waiting` (the broker has not agreed to send from its cursor), `heard` (it gets what the subscription brings),
 * `paused` (its queue is full: the log keeps what comes), `ended`.
 */
export class Reader {
  /** @type {'waiting' | 'heard' | 'paused' | 'ended'} */
  phase = 'waiting';
  /** Complete up to here; undefined: from whenever the broker agrees. @type {number | undefined} */
  cursor;
  /** @type {string | undefined} */
  epoch;
  /** Whether the broker has ever agreed. */
  begun = false;
  /** Whether it has caught up. */
  live = false;
  /** The client_id that it belongs to, once it has begun. @type {string | null | undefined} */
  owner;
  /** Where it has begun. */
  start = 0;
  /** How many messages of the past it still has to ask for. */
  last;
  /** Those of the past, newest page last, while they are fetched. @type {any[]} */
  past = [];
  /** What has come meanwhile; undefined unless it waits for its past. @type {any[] | undefined} */
  held;

  /**
   * @param {Feed} feed
   * @param {Start} start
   * @param {any} owner what the effects about it are for
   */
  constructor(feed, { since, epoch, last }, owner) {
    this.feed = feed;
    this.cursor = since;
    this.epoch = since === undefined ? undefined : epoch;
    this.last = last;
    this.target = owner;
  }

  get attached() {
    return this.phase === 'waiting' || this.phase === 'heard';
  }

  /**
   * Whether the broker sends what it is owed, when it was asked for everything after `since` of `epoch` and sends that of
   * `present`. Where these are two epochs, the broker has told of the gap from there, and not from anywhere else.
   *
   * @param {number} since @param {string | undefined} epoch @param {string} present
   */
  isAfter(since, epoch, present) {
    const cursor = Number(this.cursor);
    return this.epoch === epoch && (epoch === present ? cursor >= since : cursor === since);
  }

  /** The broker sends from now on; `seq` and `epoch` are where it stands. @param {number} seq @param {string} epoch */
  place(seq, epoch) {
    this.phase = 'heard';
    if (!this.begun) this.start = this.cursor ?? seq;
    this.cursor ??= seq;
    this.epoch ??= epoch;
  }

  /**
   * Whether a message with this seq is new to it; its cursor is there then.
   *
   * A message that no gap precedes says that what came before stands in its epoch as it stood in the reader's own.
   *
   * @param {number} seq @param {string} epoch
   */
  take(seq, epoch) {
    if (seq <= /** @type {number} */ (this.cursor)) return false;
    this.cursor = seq;
    this.epoch = epoch;
    return true;
  }

  /** It is complete up to there. @param {number} seq @param {string} epoch */
  move(seq, epoch) {
    this.cursor = epoch === this.epoch ? Math.max(seq, this.cursor ?? 0) : seq;
    this.epoch = epoch;
  }

  /**
   * Something may be missing from what the subscription brings. Returns what of that is missing here.
   *
   * @param {{from: number, to: number, epoch: string}} gap @returns {{from: number, to: number} | undefined}
   */
  miss({ from, to, epoch }) {
    const same = epoch === this.epoch;
    if (same && to <= Number(this.cursor)) return undefined;
    const first = same ? Math.max(from, Number(this.cursor) + 1) : from;
    this.move(to, epoch);
    return { from: first, to };
  }
}
