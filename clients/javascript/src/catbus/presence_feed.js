/**
 * The members of the channels of one pattern: a snapshot, then their changes.
 *
 * @module
 */

import { Subscriber } from './subscriber.js';

/** A subscriber without a cursor: every `subscribe` brings it a snapshot. */
export class PresenceFeed extends Subscriber {
  /** The members so far, and the changes meanwhile; undefined after the end of a snapshot. @type {{members: any[], changes: any[]} | undefined} */
  #snapshot;

  /** @returns {{presence: true}} */
  get needs() {
    return { presence: true };
  }

  follow() {
    this.#snapshot = { members: [], changes: [] };
    return true;
  }

  activate() {
    this.phase = 'active';
  }

  isNew() {
    return false;
  }

  moveTo() {}

  /** @returns {undefined} */
  gapFor() {}

  /** @param {any} object @returns {[import('./shared_subscription.js').What, any][]} */
  receive(object) {
    if (object.type === 'presence') {
      if (!this.#snapshot) return [['change', object]];
      this.#snapshot.changes.push(object);
    } else if (object.type === 'members') {
      // The broker also sends a snapshot if it had to drop changes.
      this.#snapshot ??= { members: [], changes: [] };
      this.#snapshot.members.push(...object.members);
      if (object.complete) {
        // Pages are read one after another, so a change may be newer than the page with its member.
        const { members, changes } = this.#snapshot;
        this.#snapshot = undefined;
        return [['snapshot', [...members, ...changes]]];
      }
    }
    return [];
  }
}
