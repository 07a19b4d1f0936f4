/**
 * Moments at which something is to be done. The time is an argument: nothing here looks at a clock.
 *
 * @module
 */

/** No timer runs sooner than this after it was set, in milliseconds, so no mistake elsewhere makes a loop without a pause. */
const MIN_DELAY = 4;

/** Timers by name; a name has one at a time. */
export class Timers {
  /** The latest moment that was told, in milliseconds of a clock that never goes back. */
  now = 0;
  /** @type {Map<string, {at: number, run: (late: number) => void}>} */
  #timers = new Map();

  /** When the next one is due. @returns {number | undefined} */
  get next() {
    let next;
    for (const { at } of this.#timers.values()) if (next === undefined || at < next) next = at;
    return next;
  }

  /**
   * Have something done later, in the place of what the name has meant so far. `run` is told by how much it is late.
   *
   * @param {string} name @param {number} delay in milliseconds @param {(late: number) => void} run
   */
  set(name, delay, run) {
    this.#timers.set(name, { at: this.now + Math.max(MIN_DELAY, delay), run });
  }

  /** @param {string} name */
  has(name) {
    return this.#timers.has(name);
  }

  /** @param {string} name */
  cancel(name) {
    this.#timers.delete(name);
  }

  /** It is `now`: do what is due, in its order. @param {number} now */
  advance(now) {
    this.now = Math.max(this.now, now);
    const due = [...this.#timers].filter(([, { at }]) => at <= this.now).sort(([, a], [, b]) => a.at - b.at);
    for (const [name, timer] of due) {
      // One before it may have cancelled it, or set it anew.
      if (this.#timers.get(name) !== timer) continue;
      this.#timers.delete(name);
      timer.run(this.now - timer.at);
    }
  }
}
