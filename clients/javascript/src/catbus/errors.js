/**
 * The errors of this client, and whether to reconnect after them.
 *
 * Names are literal: a minifier renames classes, and `error.name` has to stay what the documentation says.
 *
 * @module
 */

/** The base of all errors of this client. `code` is one of section 10 of the specification, or a word of the client's own. */
export class CatbusError extends Error {
  /** @param {string} code @param {string} message */
  constructor(code, message) {
    super(message);
    this.name = 'CatbusError';
    /** The reason, for programs. */
    this.code = code;
  }
}

/**
 * A request was refused, by the broker or before it was sent. After the code `unknown` a message may have been published.
 *
 * Thrown by a `token` function it means that there will be no other token: the client ends and does not reconnect.
 */
export class RefusedError extends CatbusError {
  /** @param {string} code @param {string} message @param {number} [retryAfter] seconds @param {number} [seq] */
  constructor(code, message, retryAfter, seq) {
    super(code, message);
    this.name = 'RefusedError';
    /** Seconds for which the broker would reject the same request again, if it says so. */
    this.retryAfter = retryAfter;
    /** With the code `conflict`: the seq of the channel's retained message, 0 for none. */
    this.seq = seq;
  }
}

/** There is no connection. */
export class DisconnectedError extends CatbusError {
  /** @param {string} message @param {{closeCode?: number, final?: boolean}} [more] */
  constructor(message, { closeCode, final = false } = {}) {
    super('disconnected', message);
    this.name = 'DisconnectedError';
    /** The close code (section 11 of the specification), if there was one. @type {number | undefined} */
    this.closeCode = closeCode;
    /** Whether the client does not reconnect. */
    this.final = final;
  }
}

/** The error for requests of an earlier session under another client_id. */
export const ANOTHER_CLIENT = 'the connection belongs to another client_id';

/** Codes after which the same request can succeed later (section 10). A code that is not known counts as `internal`. */
export const RETRYABLE = new Set(['rate_limited', 'overloaded', 'unavailable', 'unknown']);

/** Codes after which the same token is never accepted. */
const FINAL = new Set(
  'bad_message unauthenticated unauthorized invalid_channel invalid_pattern too_large token_expired revoked limit'.split(' '),
);

/** Codes after which another token may be accepted. */
const RENEWABLE = new Set(['token_expired', 'revoked']);

/** Close codes of WebSocket for a message that must not be sent again (section 11). */
const PROTOCOL_ERROR_CODES = new Set([1002, 1003, 1007, 1009]);

/** @param {number} code @param {string} reason what the broker says */
export function closedBy(code, reason) {
  const final = (code >= 4000 && code < 4400) || PROTOCOL_ERROR_CODES.has(code);
  return new DisconnectedError(reason || `the connection was lost (${code})`, { closeCode: code, final });
}

/** Whether the error is final. @param {Error} why @param {boolean} renewable whether there are other tokens */
export function isFinal(why, renewable) {
  if (why instanceof DisconnectedError) {
    const { closeCode = 0 } = why;
    return why.final || (!renewable && closeCode >= 4400 && closeCode < 4500);
  }
  return why instanceof RefusedError && FINAL.has(why.code) && !(renewable && RENEWABLE.has(why.code));
}

/** Anything that was thrown, as an error. @param {unknown} thrown @returns {Error} */
export function asError(thrown) {
  return thrown instanceof Error ? thrown : new Error(`${thrown}`);
}
