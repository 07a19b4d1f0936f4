/**
 * Checks of the arguments of public calls. The error names the argument.
 *
 * @module
 */

import { RefusedError } from './errors.js';

const CURSOR = /^(\d{1,16})\.([^\s]{1,255})$/;

/**
 * A position in the log.
 *
 * @typedef {{seq: number, epoch: string | undefined}} Place
 */

/** Encode a position as opaque text. @param {number} seq @param {string} epoch */
export function encodeCursor(seq, epoch) {
  return `${seq}.${epoch}`;
}

/** The error for text without a UTF-8 form: the broker could not decode the object around it. */
export const LONE_SURROGATE = 'a lone surrogate';

/**
 * The position that an argument names: a cursor, or a seq with its epoch.
 *
 * @param {string} name the argument's name @param {unknown} value @param {unknown} [epoch] @returns {Place | undefined}
 */
export function checkPosition(name, value, epoch) {
  if (epoch !== undefined && typeof epoch !== 'string') throw wrong('epoch', 'a string', epoch);
  if (value === undefined) return undefined;
  if (typeof value === 'string') {
    const [, seq, own] = CURSOR.exec(value) ?? [];
    if (!Number.isSafeInteger(Number(seq))) throw wrong(name, 'a seq or the cursor of a message', value);
    return { seq: Number(seq), epoch: own };
  }
  return { seq: checkInteger(name, value, 0), epoch };
}

/** @param {string} name @param {any} value @param {number} least @returns {number} */
export function checkInteger(name, value, least) {
  if (!Number.isSafeInteger(value) || value < least) throw wrong(name, `an integer from ${least}`, value);
  return value;
}

/** @param {string} name @param {unknown} value @returns {string} */
export function checkText(name, value) {
  if (typeof value !== 'string') throw wrong(name, 'a text', value);
  if (/[\ud800-\udfff]/u.test(value)) throw new RefusedError('bad_message', `${name}: ${LONE_SURROGATE}`);
  return value;
}

/** @param {string} name @param {unknown} value @returns {asserts value is Function | undefined} */
export function checkFunction(name, value) {
  if (value !== undefined && typeof value !== 'function') throw wrong(name, 'a function', value);
}

/** @param {string} name @param {unknown} value @param {number} least in milliseconds */
export function checkDuration(name, value, least) {
  if (typeof value !== 'number' || !(value >= least)) throw wrong(name, `milliseconds from ${least}`, value);
}

/** @param {string} name @param {string} right what it should be @param {unknown} value */
export function wrong(name, right, value) {
  const shown = typeof value === 'string' ? JSON.stringify(value.slice(0, 60)) : typeof value === 'object' ? 'object' : String(value);
  return new TypeError(`${name}: ${right}, not ${shown}`);
}
