/**
 * Cursors that outlive a page.
 *
 * @module
 */

/** How long a cursor may wait to be written, in milliseconds. A page that is hidden or left writes it at once. */
const DELAY = 200;
const PREFIX = 'catbus:';

/**
 * Keep a cursor. `load` says what was kept, `touch` that the position is another one, `close` that none follows.
 *
 * @param {string} name @param {import('./types.js').StorageLike | undefined} storage
 * @param {() => string | undefined} position where the subscription is
 */
export function keepCursor(name, storage, position) {
  const key = PREFIX + name;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;
  const stop = listenFor(['pagehide', 'visibilitychange', 'freeze'], flush);

  /**
   * Do something with the storage. Where it is forbidden, a subscription starts as if nothing was kept; where it is full,
   * what comes again after a reload is dropped by nobody but the application.
   *
   * @template T @param {(storage: import('./types.js').StorageLike | undefined) => T} use @returns {T | undefined}
   */
  function attempt(use) {
    try {
      return use(storage ?? globalThis.localStorage);
    } catch {
      return undefined;
    }
  }

  function flush() {
    clearTimeout(timer);
    timer = undefined;
    const at = position();
    if (at !== undefined) attempt((place) => place?.setItem(key, at));
  }

  return {
    load: () => attempt((place) => place?.getItem(key)) ?? undefined,
    touch() {
      timer ??= setTimeout(flush, DELAY);
    },
    close() {
      flush();
      stop();
    },
  };
}

/**
 * Listen on the page, where there is one: events of the document bubble to the window. Returns what ends it.
 *
 * @param {string[]} types @param {() => void} listener
 */
export function listenFor(types, listener) {
  for (const type of types) globalThis.addEventListener?.(type, listener, true);
  return () => {
    for (const type of types) globalThis.removeEventListener?.(type, listener, true);
  };
}
