/**
 * Cursors that outlive a page.
 *
 * @module
 */

/** How long a cursor may wait to be written, in milliseconds. A page that is hidden or left writes it at once. */
const DELAY = 200;
const PREFIX = 'catbus:';

export class Persisted {
  #key;
  #storage;
  #position;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  #flush = () => this.flush();

  /**
   * @param {string} key @param {import('./types.js').StorageLike | undefined} storage
   * @param {() => string | undefined} position where the subscription is
   */
  constructor(key, storage, position) {
    this.#key = PREFIX + key;
    this.#storage = storage ?? defaultStorage();
    this.#position = position;
    for (const type of ['pagehide', 'visibilitychange', 'freeze']) addListener(type, this.#flush);
  }

  /** What was kept. @returns {string | undefined} */
  load() {
    try {
      return this.#storage?.getItem(this.#key) ?? undefined;
    } catch {
      return undefined; // Where storage is forbidden, the subscription starts as if nothing was kept.
    }
  }

  /** The position is another one. */
  touch() {
    this.#timer ??= setTimeout(this.#flush, DELAY);
  }

  flush() {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    const position = this.#position();
    if (position === undefined) return;
    try {
      this.#storage?.setItem(this.#key, position);
    } catch {
      // It is full, or forbidden: what comes again after a reload is dropped by nobody but the application.
    }
  }

  close() {
    this.flush();
    for (const type of ['pagehide', 'visibilitychange', 'freeze']) removeListener(type, this.#flush);
  }
}

function defaultStorage() {
  try {
    return globalThis.localStorage;
  } catch {
    return undefined;
  }
}

/** Listen on the page, where there is one: events of the document bubble to the window. @param {string} type @param {() => void} listener */
export function addListener(type, listener) {
  globalThis.addEventListener?.(type, listener, true);
}

/** @param {string} type @param {() => void} listener */
export function removeListener(type, listener) {
  globalThis.removeEventListener?.(type, listener, true);
}
