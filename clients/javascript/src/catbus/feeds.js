/**
 * One subscription on the wire, and what its readers are told.
 *
 * @module
 */

import { RefusedError, TRY_AGAIN } from './errors.js';

/** @typedef {import('./core.js').Settler} Settler */
/** @typedef {import('./link.js').Link} Link */
/** @typedef {import('./link.js').Lane} Lane */
/** @typedef {import('./readers.js').Reader} Reader */

/** How long to wait before the broker is asked again, in milliseconds. */
export const RETRY_PAUSE = 500;

/**
 * What happens to a reader: `begun`, `message`, `gap`, `live`, `ended`.
 *
 * @typedef {'begun' | 'message' | 'gap' | 'live' | 'ended'} What
 *
 * @typedef {object} Telling
 * @property {(reader: Reader, what: What, value: any) => void} tell
 * @property {(event: string, value: any) => void} emit
 *
 * @typedef {import('./publishes.js').Host & Telling & {requests: import('./requests.js').Requests}} Host
 */

/** One subscription on the wire, whatever connection it has at the moment. */
export class Feed {
  /** @type {Set<Reader>} */
  readers = new Set();
  /** Where it is heard. @type {Lane | undefined} */
  lane;
  /** The newest `subscribe`, while it has no answer. @type {{id: number, link: Link, at: number, since: number | undefined, epoch: string | undefined} | undefined} */
  asked;
  /** Whether the broker has said that it has caught up. */
  live = false;
  /** Whether it was asked for from a place in another epoch, and is on its way into the present one: a gap may come. */
  crossing = false;
  /** Complete up to here, on its lane; and where the replica was when it agreed. */
  seq = 0;
  head = 0;
  /** How often in a row the broker could not take it up. */
  tries = 0;
  stream = false;
  datagrams = false;

  /** @param {string} pattern */
  constructor(pattern) {
    this.pattern = pattern;
  }

  /** Those that get what it brings. */
  get heard() {
    return [...this.readers].filter(({ phase }) => phase === 'heard');
  }

  get attached() {
    return [...this.readers].filter((reader) => reader.attached);
  }

  /**
   * From where it has to be asked for: after the lowest cursor of its readers in the present epoch.
   *
   * Readers in another epoch are asked for one by one, when the subscription has caught up: only a cursor of their own
   * tells the broker which gap they have.
   *
   * @param {Link} link @returns {{since: number | undefined, epoch: string | undefined}}
   */
  wish(link) {
    const { attached } = this;
    const placed = attached.filter(({ cursor }) => cursor !== undefined);
    for (const reader of placed) if (!reader.epoch && link.epoch) reader.epoch = link.epoch;
    const waiting = placed.find(({ phase }) => phase === 'waiting');
    const heard = placed.find(({ phase }) => phase === 'heard');
    const caughtUp = this.lane?.link === link && this.live;
    const first = caughtUp ? waiting ?? heard : heard ?? waiting;
    if (!first) return { since: undefined, epoch: undefined };
    const { epoch } = first;
    const together = epoch === link.epoch ? placed.filter((reader) => reader.epoch === epoch) : [first];
    const since = Math.min(...together.map(({ cursor }) => Number(cursor)));
    // A cursor that the log has not reached is no place for another one to start from.
    return { since: since > link.head && placed.length < attached.length ? undefined : since, epoch };
  }
}

/**
 * Tell a reader something, after the messages of the past that it still waits for.
 *
 * @param {Telling} host @param {Reader} reader @param {What} what @param {any} value
 */
export function tell(host, reader, what, value) {
  if (reader.held) reader.held.push([what, value]);
  else host.tell(reader, what, value);
}

/**
 * Get what was published before a reader began, a page at a time; then tell it that, and what has come meanwhile.
 *
 * @param {Host} host @param {Reader} reader @param {number} wanted @param {number} before
 */
export function fetchPast(host, reader, wanted, before) {
  /** @type {Settler} */
  const done = (error, page) => {
    if (reader.phase === 'ended') return;
    if (error instanceof RefusedError && TRY_AGAIN.has(error.code)) {
      host.timers.set(`past ${host.nextId()}`, RETRY_PAUSE, () => fetchPast(host, reader, wanted, before));
      return;
    }
    const messages = page?.messages ?? [];
    reader.past.unshift(...messages);
    if (error) host.emit('error', error);
    else if (page.more && messages.length && messages.length < wanted) {
      return fetchPast(host, reader, wanted - messages.length, messages[0].seq);
    }
    const { past, held, epoch } = reader;
    reader.past = [];
    reader.held = undefined;
    for (const message of past) host.tell(reader, 'message', { message, epoch });
    for (const [what, value] of held ?? []) host.tell(reader, what, value);
  };
  host.requests.history(reader.feed.pattern, wanted, before, done, true);
}
