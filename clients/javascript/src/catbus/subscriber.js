/**
 * The cursor of one handler of a subscription, which receives everything after it, once and in order.
 *
 * @module
 */

/** @typedef {import('./shared_subscription.js').SharedSubscription} SharedSubscription */
/** @typedef {{since?: number | undefined, epoch?: string | undefined, last?: number | undefined}} Start */

/**
 * An accepted `subscribe`.
 *
 * @typedef {object} Accepted
 * @property {number | undefined} since the position that it named
 * @property {string | undefined} epoch the epoch of `since`
 * @property {number} seq where it begins without `since`
 * @property {string} present the epoch of the log
 * @property {boolean} continued whether it continues, on the same stream, where the one before has ended
 */

/**
 * One handler of a pattern. Several share one subscription at the broker; each drops what is not above its own cursor.
 *
 * Phases: `requested` (a `subscribe` from its cursor has no reply), `active` (it receives the messages),
 * `paused` (its queue is full, and the log keeps the rest), `ended`.
 */
export class Subscriber {
  /** @type {'requested' | 'active' | 'paused' | 'ended'} */
  phase = 'requested';
  /** Complete up to here; undefined: it starts at the head. @type {number | undefined} */
  cursor;
  /** @type {string | undefined} */
  epoch;
  /** Whether the broker has ever accepted a `subscribe` for it. */
  started = false;
  /** Whether it has caught up. */
  live = false;
  /** The client_id under which it started. @type {string | null | undefined} */
  owner;
  /** The seq at which it started. */
  start = 0;
  /** The number of history messages that are still to be fetched. */
  last;
  /** The history, oldest first, while it is fetched. @type {any[]} */
  history = [];
  /** Notifications that arrived meanwhile; undefined unless it waits for its history. @type {any[] | undefined} */
  buffered;

  /**
   * @param {SharedSubscription} subscription
   * @param {Start} start
   * @param {any} owner the target of its notifications
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

  /** The snapshots that it needs, if it is a feed. @returns {{retained?: true, presence?: true} | undefined} */
  get needs() {
    return undefined;
  }

  /** Whether only a `subscribe` without `since` helps it. */
  get needsSnapshot() {
    return false;
  }

  /**
   * Follow an accepted `subscribe`. Returns whether it covers this subscriber.
   *
   * If `since` is of another epoch, the gap that the broker reports is right for exactly that cursor.
   *
   * @param {Accepted} accepted @returns {boolean}
   */
  follow({ since, epoch, seq, present, continued }) {
    if (this.cursor === undefined) return since === undefined || epoch === present;
    if (continued && this.phase === 'active') this.moveTo(seq, present);
    const [from, of] = since === undefined ? [seq, present] : [since, epoch];
    return this.epoch === of && (of === present ? this.cursor >= from : this.cursor === from);
  }

  /** Activate it: the broker has accepted its `subscribe`, at `seq` of `epoch`. @param {number} seq @param {string} epoch */
  activate(seq, epoch) {
    this.phase = 'active';
    if (!this.started) this.start = this.cursor ?? seq;
    this.cursor ??= seq;
    this.epoch ??= epoch;
  }

  /**
   * Whether a message with this seq is new to it. Moves its cursor there.
   *
   * A message with no gap before it shows that the seqs of both epochs agree up to there.
   *
   * @param {number} seq @param {string} epoch @param {any} [message]
   */
  isNew(seq, epoch, message) {
    void message;
    if (seq <= /** @type {number} */ (this.cursor)) return false;
    this.cursor = seq;
    this.epoch = epoch;
    return true;
  }

  /** Move its cursor: it is complete up to there. @param {number} seq @param {string} epoch */
  moveTo(seq, epoch) {
    this.cursor = epoch === this.epoch ? Math.max(seq, this.cursor ?? 0) : seq;
    this.epoch = epoch;
  }

  /**
   * Move its cursor past a gap, and return the part that it has not received.
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

  /**
   * Take a part of a snapshot, or a change of members. Returns its notifications.
   *
   * @param {any} object @returns {[import('./shared_subscription.js').What, any][]}
   */
  receive(object) {
    void object;
    return [];
  }
}
