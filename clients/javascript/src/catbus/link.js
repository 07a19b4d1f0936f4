/**
 * One connection as the core sees it: what it is told, and what it has to send.
 *
 * @module
 */

import { Splitter } from './framing.js';

/** @typedef {import('./feeds.js').Feed} Feed */
/** @typedef {import('./routes.js').Kind} Kind */

/** One stream of the broker's: the session's, or one of a single subscription. */
export class Lane {
  /** The epoch of the log that what comes here is from. */
  epoch = '';
  /** The subscription whose own stream it is. @type {Feed | undefined} */
  feed;

  /** @param {Link} link @param {boolean} own whether it is a stream of one subscription @param {(json: string) => any} parse */
  constructor(link, own, parse) {
    this.link = link;
    this.own = own;
    this.splitter = new Splitter(parse);
  }
}

/**
 * One connection, from the first try to its end. What a broker says of it is kept here; nothing here waits.
 *
 * Phases: `opening` (no transport yet), `token` (waiting for one), `authenticating`, `open`, `ended`.
 */
export class Link {
  /** @type {'opening' | 'token' | 'authenticating' | 'open' | 'ended'} */
  phase = 'opening';
  /** The token that was last sent. */
  token = '';
  /** Whether an `auth` has no answer yet. */
  asking = false;
  /** How many renewals in a row came early. */
  early = 0;
  /** Whether the broker has said that it is about to stop. */
  leaving = false;
  /** When something was last heard, in the core's time. */
  heard = 0;
  /** The pings of its own that have no answer, and when they were sent. @type {Map<number, number>} */
  pings = new Map();

  /** @type {string | null} */
  clientId = null;
  producer = '';
  epoch = '';
  head = 0;
  floor = 0;
  /** @type {Record<string, number>} */
  limits = {};

  /** @type {Map<unknown, Lane>} */
  #lanes = new Map();
  /** What waits to be sent. @type {string[]} */
  #outbox = [];
  #parse;
  #ready;

  /**
   * @param {number} id @param {{url: string, kind: Kind}} route @param {(json: string) => any} parse
   * @param {(link: Link) => void} ready called when something waits to be sent, and nothing did
   */
  constructor(id, route, parse, ready) {
    this.id = id;
    this.#ready = ready;
    this.url = route.url;
    this.kind = route.kind;
    this.#parse = parse;
    this.main = new Lane(this, false, parse);
  }

  /** The lane of a stream; `undefined` is the session's. @param {unknown} stream */
  lane(stream) {
    if (stream === undefined) return this.main;
    let lane = this.#lanes.get(stream);
    if (!lane) {
      lane = new Lane(this, true, this.#parse);
      lane.epoch = this.epoch;
      this.#lanes.set(stream, lane);
    }
    return lane;
  }

  /** Forget a stream that has ended. @param {unknown} stream */
  forget(stream) {
    this.#lanes.delete(stream);
  }

  /** @param {object} message */
  send(message) {
    this.sendText(JSON.stringify(message));
  }

  /** @param {string} text */
  sendText(text) {
    if (this.phase === 'ended') return;
    this.#outbox.push(text);
    if (this.#outbox.length === 1) this.#ready(this);
  }

  /** Take what waits to be sent. @returns {string[]} */
  take() {
    const texts = this.#outbox;
    this.#outbox = [];
    return texts;
  }

  /** Take over what `auth_ok` says. @param {any} answer */
  accept(answer) {
    this.clientId = answer.client_id ?? null;
    this.producer = answer.producer ?? this.producer;
    this.limits = answer.limits ?? this.limits;
    this.floor = answer.floor ?? this.floor;
    this.advance(answer.head ?? 0, answer.epoch ?? '', this.main);
  }

  /**
   * A stream tells where the log is. What is new to that stream may be old to the others, and the other way round.
   *
   * @param {number} seq @param {string} epoch @param {Lane} lane
   */
  advance(seq, epoch, lane) {
    if (epoch === this.epoch) this.head = Math.max(seq, this.head);
    else if (epoch !== lane.epoch) [this.head, this.epoch] = [seq, epoch];
    lane.epoch = epoch;
  }
}
