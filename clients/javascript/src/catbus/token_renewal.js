/**
 * When a token expires, and when to ask for the next one.
 *
 * @module
 */

/** Milliseconds before the expiry of a token at which the client asks for the next one. */
const RENEWAL_MARGIN = 30_000;
const MIN_RENEWAL_DELAY = 1000;

/** When a token expires, in milliseconds since 1970, or undefined if it does not say. @param {string} token @returns {number | undefined} */
export function expiryOf(token) {
  return momentIn(token, 'exp');
}

/**
 * Milliseconds until the next token is needed, or undefined if never. `now` is in milliseconds since 1970.
 *
 * The broker has just accepted the token. If it seems to be expired, or to last longer than its lifetime,
 * the clock of this device is wrong, and the token counts as just issued.
 *
 * @param {string} token @param {number} now @returns {number | undefined}
 */
export function renewalDelay(token, now) {
  const expires = momentIn(token, 'exp');
  if (expires === undefined) return undefined;
  let left = expires - now;
  const life = expires - (momentIn(token, 'iat') ?? Infinity);
  if (life > 0 && !(left > 0 && left <= life)) left = life;
  else if (left < -2 * RENEWAL_MARGIN) return RENEWAL_MARGIN;
  return Math.max(MIN_RENEWAL_DELAY, left / 2, left - RENEWAL_MARGIN);
}

/**
 * The least time between two renewals, after so many early ones in a row: a clock that is wrong by the lifetime of a
 * token would request one every second.
 *
 * @param {number} early
 */
export function minRenewalDelay(early) {
  return Math.min(RENEWAL_MARGIN, MIN_RENEWAL_DELAY * 2 ** Math.min(early, 10));
}

/** @param {string} token @param {string} claim @returns {number | undefined} milliseconds since 1970 */
function momentIn(token, claim) {
  const part = token.startsWith('sub-') ? token.slice(4).split('.')[0] : token.split('.')[1];
  try {
    const bytes = Uint8Array.from(atob(part.replace(/-/g, '+').replace(/_/g, '/')), (c) => c.charCodeAt(0));
    const value = JSON.parse(new TextDecoder().decode(bytes))[claim];
    return typeof value === 'number' ? value * 1000 : undefined;
  } catch {
    return undefined;
  }
}
