/**
 * The retained messages of one pattern: a snapshot, then what follows it.
 *
 * @module
 */

import { Subscriber } from './subscriber.js';

/**
 * A subscriber that needs the state before its changes. What changes while the broker reads a snapshot is left out of it, and
 * comes as messages before `live`. From then on the state is whole, and the feed has a cursor at which it resumes. Until then,
 * and after a gap, it needs a snapshot.
 */
export class RetainedFeed extends Subscriber {
  /** Its messages so far, and the position up to which they go. @type {{seq: number, epoch: string, messages: any[], complete: boolean} | undefined} */
  #snapshot;

  /** @returns {{retained: true}} */
  get needs() {
    return { retained: true };
  }

  get needsSnapshot() {
    return this.cursor === undefined;
  }

  /** @param {import('./subscriber.js').Accepted} accepted */
  follow(accepted) {
    if (this.cursor !== undefined && super.follow(accepted)) return true;
    if (accepted.since !== undefined) return false;
    this.#begin(accepted.seq, accepted.present);
    return true;
  }

  activate() {
    this.phase = 'active';
  }

  /** @param {number} seq @param {string} epoch @param {any} message */
  isNew(seq, epoch, message) {
    if (!this.#snapshot) return this.cursor !== undefined && super.isNew(seq, epoch);
    // It belongs to the snapshot.
    if (seq > this.#snapshot.seq) {
      if (message.retain) this.#snapshot.messages.push(message);
      Object.assign(this.#snapshot, { seq, epoch });
    }
    return false;
  }

  /** @param {number} seq @param {string} epoch */
  moveTo(seq, epoch) {
    if (this.cursor !== undefined) super.moveTo(seq, epoch);
  }

  /** The broker sends another snapshot after a gap. @param {{from: number, to: number, epoch: string}} gap @returns {undefined} */
  gapFor({ to, epoch }) {
    if (this.cursor === undefined || epoch !== this.epoch || to > this.cursor) this.#begin(to, epoch);
  }

  /** @param {any} object @returns {[import('./shared_subscription.js').What, any][]} */
  receive({ type, messages, complete }) {
    const snapshot = this.#snapshot;
    // A subscription that resumes for others may repeat the snapshot.
    if (!snapshot) return [];
    if (type === 'retained') {
      snapshot.messages.push(...messages);
      snapshot.complete = complete;
    }
    if (type !== 'live' || !snapshot.complete) return [];
    this.#snapshot = undefined;
    this.cursor = snapshot.seq;
    this.epoch = snapshot.epoch;
    return [['snapshot', snapshot.messages]];
  }

  /** @param {number} seq @param {string} epoch */
  #begin(seq, epoch) {
    this.cursor = undefined;
    this.#snapshot = { seq, epoch, messages: [], complete: false };
  }
}
