/**
 * The arguments of public calls, checked where they are given: a wrong one is an error of its own call.
 *
 * @module
 */

import { RefusedError } from './errors.js';

const CURSOR = /^(\d{1,16})\.([^\s]{1,255})$/;

/**
 * A place in the log.
 *
 * @typedef {{seq: number, epoch: string | undefined}} Place
 */

/** The opaque text that stands for a place. @param {number} seq @param {string} epoch */
export function encodeCursor(seq, epoch) {
  return `${seq}.${epoch}`;
}

/**
 * The place that an argument names: a cursor, or a seq with its epoch.
 *
 * @param {string} name the argument's name @param {unknown} value @param {unknown} [epoch] @returns {Place | undefined}
 */
export function checkPlace(name, value, epoch) {
  if (epoch !== undefined && typeof epoch !== 'string') throw new TypeError(`epoch: a string, not ${show(epoch)}`);
  if (value === undefined) return undefined;
  if (typeof value === 'string') {
    const [, seq, own] = CURSOR.exec(value) ?? [];
    if (own === undefined || !Number.isSafeInteger(Number(seq))) {
      throw new TypeError(`${name}: a seq or the cursor of a message, not ${show(value)}`);
    }
    return { seq: Number(seq), epoch: own };
  }
  return { seq: checkInteger(name, value, 0), epoch };
}

/** @param {string} name @param {unknown} value @param {number} least @returns {number} */
export function checkInteger(name, value, least) {
  if (typeof value !== 'number' || !Number.isSafeInteger(value) || value < least) {
    throw new TypeError(`${name}: an integer from ${least}, not ${show(value)}`);
  }
  return value;
}

/** @param {string} name @param {unknown} value @returns {string} */
export function checkText(name, value) {
  if (typeof value !== 'string') throw new TypeError(`${name}: a text, not ${show(value)}`);
  // It is no text in UTF-8: the broker could not decode the object around it.
  if (/[\ud800-\udfff]/u.test(value)) throw new RefusedError('bad_message', `${name}: half of a surrogate pair is no text`);
  return value;
}

/** @param {string} name @param {unknown} value @returns {asserts value is Function | undefined} */
export function checkFunction(name, value) {
  if (value !== undefined && typeof value !== 'function') throw new TypeError(`${name}: a function, not ${show(value)}`);
}

/** @param {string} name @param {unknown} value @param {number} least in milliseconds */
export function checkDuration(name, value, least) {
  if (typeof value !== 'number' || !(value >= least)) throw new TypeError(`${name}: milliseconds from ${least}, not ${show(value)}`);
  return value;
}

/** @param {unknown} value */
function show(value) {
  return typeof value === 'string' ? JSON.stringify(value.slice(0, 60)) : typeof value === 'object' ? typeof value : String(value);
}
