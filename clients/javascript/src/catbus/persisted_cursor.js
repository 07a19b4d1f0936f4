/**
 * Cursors that survive a reload of the page.
 *
 * @module
 */

/** Milliseconds before a changed cursor is written. A page that is hidden or left writes it at once. */
const DELAY = 200;
const PREFIX = 'catbus:';

/**
 * Store a cursor. `load` returns the stored one, `touch` announces a new position, `close` writes the last one.
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
   * Use the storage. If it is forbidden, a subscription starts as if nothing was stored. If it is full,
   * messages may be repeated after a reload.
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
 * Listen on the page, if there is one: events of the document bubble to the window. Returns a function that ends it.
 *
 * @param {string[]} types @param {() => void} listener
 */
export function listenFor(types, listener) {
  for (const type of types) globalThis.addEventListener?.(type, listener, true);
  return () => {
    for (const type of types) globalThis.removeEventListener?.(type, listener, true);
  };
}
