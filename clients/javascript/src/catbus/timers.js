/**
 * Timers. The time is an argument: this module reads no clock.
 *
 * @module
 */

/** The shortest delay of a timer, in milliseconds, so that no mistake elsewhere makes a busy loop. */
const MIN_DELAY = 4;

/** Timers by name. Each name has one timer. */
export class Timers {
  /** The time, in milliseconds of a monotonic clock. */
  now = 0;
  /** @type {Map<string, {at: number, run: (late: number) => void}>} */
  #timers = new Map();

  /** When the next timer is due. @returns {number | undefined} */
  get next() {
    let next;
    for (const { at } of this.#timers.values()) if (next === undefined || at < next) next = at;
    return next;
  }

  /**
   * Set a timer, in place of the present one of that name. `run` is called with its delay beyond the due time.
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

  /** Set the time, and run the timers that are due, in order. @param {number} now */
  advance(now) {
    this.now = Math.max(this.now, now);
    const due = [...this.#timers].filter(([, { at }]) => at <= this.now).sort(([, a], [, b]) => a.at - b.at);
    for (const [name, timer] of due) {
      // A timer before it may have cancelled it, or set it again.
      if (this.#timers.get(name) !== timer) continue;
      this.#timers.delete(name);
      timer.run(this.now - timer.at);
    }
  }
}
