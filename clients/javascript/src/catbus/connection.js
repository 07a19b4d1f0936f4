/**
 * One connection as the core sees it: what it is told, and what it has to send.
 *
 * @module
 */

import { JsonSplitter } from './json_splitter.js';

/** @typedef {import('./shared_subscription.js').SharedSubscription} SharedSubscription */
/** @typedef {import('./broker_addresses.js').Kind} Kind */

/** One stream of the broker's: the session's, or one of a single subscription. */
export class IncomingStream {
  /** The epoch of the log that what comes here is from. */
  epoch = '';
  /** The subscription whose own stream it is. @type {SharedSubscription | undefined} */
  subscription;

  /** @param {Connection} connection @param {boolean} own whether it is a stream of one subscription @param {(json: string) => any} parse */
  constructor(connection, own, parse) {
    this.connection = connection;
    this.own = own;
    this.splitter = new JsonSplitter(parse);
  }
}

/**
 * One connection, from the first try to its end. What a broker says of it is kept here; nothing here waits.
 *
 * Phases: `opening` (no transport yet), `token` (waiting for one), `authenticating`, `open`, `ended`.
 */
export class Connection {
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

  /** @type {Map<unknown, IncomingStream>} */
  #streams = new Map();
  /** What waits to be sent. @type {string[]} */
  #outgoing = [];
  #parse;
  #ready;

  /**
   * @param {number} id @param {{url: string, kind: Kind}} route @param {(json: string) => any} parse
   * @param {(connection: Connection) => void} ready called when something waits to be sent, and nothing did
   */
  constructor(id, route, parse, ready) {
    this.id = id;
    this.#ready = ready;
    this.url = route.url;
    this.kind = route.kind;
    this.#parse = parse;
    this.main = new IncomingStream(this, false, parse);
  }

  /** The incoming of a stream; `undefined` is the session's. @param {unknown} stream */
  incoming(stream) {
    if (stream === undefined) return this.main;
    let incoming = this.#streams.get(stream);
    if (!incoming) {
      incoming = new IncomingStream(this, true, this.#parse);
      incoming.epoch = this.epoch;
      this.#streams.set(stream, incoming);
    }
    return incoming;
  }

  /** Forget a stream that has ended. @param {unknown} stream */
  forget(stream) {
    this.#streams.delete(stream);
  }

  /** @param {object} message */
  send(message) {
    this.sendText(JSON.stringify(message));
  }

  /** @param {string} text */
  sendText(text) {
    if (this.phase === 'ended') return;
    this.#outgoing.push(text);
    if (this.#outgoing.length === 1) this.#ready(this);
  }

  /** Take what waits to be sent. @returns {string[]} */
  take() {
    const texts = this.#outgoing;
    this.#outgoing = [];
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
   * @param {number} seq @param {string} epoch @param {IncomingStream} incoming
   */
  advance(seq, epoch, incoming) {
    if (epoch === this.epoch) this.head = Math.max(seq, this.head);
    else if (epoch !== incoming.epoch) [this.head, this.epoch] = [seq, epoch];
    incoming.epoch = epoch;
  }
}
