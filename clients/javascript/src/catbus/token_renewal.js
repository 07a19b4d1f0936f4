/**
 * When a token expires, and when to ask for the next one.
 *
 * @module
 */

/** What a token has left when a new one is asked for: milliseconds at most, and a part of its life. */
const RENEWAL_MARGIN = 30_000;
const MIN_RENEWAL_DELAY = 1000;

/** When a token expires, in milliseconds since 1970, where it says so. @param {string} token @returns {number | undefined} */
export function expiryOf(token) {
  return momentIn(token, 'exp');
}

/**
 * How many milliseconds the next token can wait, where this one expires. `now` is in milliseconds since 1970.
 *
 * The broker has just taken the token. Where the time that is left is less than nothing, or more than the token was made
 * for, the clock of this device is wrong, and the token counts as just made.
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
 * The least time between two renewals, after so many in a row that came early: a clock that is wrong by the life of a
 * token would ask for one every second.
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
