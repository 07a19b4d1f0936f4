/**
 * Payloads as JSON: what may be published, and integers of any size.
 *
 * @module
 */

import { LONE_SURROGATE } from './argument_checks.js';
import { RefusedError } from './errors.js';

/** How deep a message may be nested, itself counted (section 4). */
const MAX_DEPTH = 64;
const TOKENS = /"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g;
/** Marks an integer among strings. It cannot be guessed, so no payload can contain it on purpose. */
const MARK = `bigint ${Math.random()} `;

/**
 * The JSON of a payload. Integers that are `bigint` are written out.
 *
 * Throws `TypeError` for a value without a JSON form, and `RefusedError` for JSON that the broker would reject.
 *
 * @param {unknown} payload @returns {string}
 */
export function encodePayload(payload) {
  let exact = false;
  /** @type {string | undefined} */
  let json = JSON.stringify(payload, (_, value) => {
    if (typeof value !== 'bigint') return value;
    exact = true;
    return MARK + value;
  });
  if (json === undefined) throw new TypeError('payload: no JSON form');
  if (exact) json = json.replaceAll(new RegExp(`"${MARK}(-?\\d+)"`, 'g'), '$1');
  // `JSON.stringify` escapes a lone surrogate like this. A backslash may itself be escaped.
  if (json.includes('\\ud') && json.replaceAll('\\\\', '').includes('\\ud')) throw new RefusedError('bad_message', `payload: ${LONE_SURROGATE}`);
  if (depthOf(json) >= MAX_DEPTH) throw new RefusedError('bad_message', `payload: nested deeper than ${MAX_DEPTH - 1}`);
  return json;
}

/** As `JSON.parse`, but integers beyond 2^53 are `bigint` and lose no digit. @param {string} json @returns {any} */
export function parseExact(json) {
  // Such an integer has 16 digits or more, and most objects have none.
  if (!/\d{16}/.test(json)) return JSON.parse(json);
  const marked = json.replace(TOKENS, (token) =>
    /^-?\d{16,}$/.test(token) && !Number.isSafeInteger(Number(token)) ? `"${MARK}${token}"` : token,
  );
  return JSON.parse(marked, (_, value) =>
    typeof value === 'string' && value.startsWith(MARK) ? BigInt(value.slice(MARK.length)) : value,
  );
}

/** How deep the arrays and objects of a JSON text are nested, at most. @param {string} json */
function depthOf(json) {
  // Most texts have too few brackets to be deep.
  const brackets = json.match(/[[{]/g)?.length ?? 0;
  if (brackets < MAX_DEPTH) return brackets;
  let deepest = 0;
  let depth = 0;
  for (const [token] of json.matchAll(/"(?:[^"\\]|\\.)*"|[[\]{}]/g)) {
    if ('[{'.includes(token)) deepest = Math.max(deepest, ++depth);
    else if (']}'.includes(token)) depth--;
  }
  return deepest;
}
