/**
 * One connection in the core: its state, and what it has to send.
 *
 * @module
 */

import { JsonSplitter } from './json_splitter.js';

/** @typedef {import('./shared_subscription.js').SharedSubscription} SharedSubscription */
/** @typedef {import('./broker_addresses.js').Kind} Kind */

/** One stream of the broker: the main stream, or that of a single subscription. */
export class IncomingStream {
  /** The epoch of the log that arrives here. */
  epoch = '';
  /** The subscription to which the stream belongs. @type {SharedSubscription | undefined} */
  subscription;

  /** @param {Connection} connection @param {boolean} own whether it belongs to one subscription @param {(json: string) => any} parse */
  constructor(connection, own, parse) {
    this.connection = connection;
    this.own = own;
    this.splitter = new JsonSplitter(parse);
  }
}

/**
 * One connection, from the first attempt to its end, and what the broker has reported on it.
 *
 * Phases: `opening` (no transport yet), `token` (waiting for a token), `authenticating`, `open`, `ended`.
 */
export class Connection {
  /** @type {'opening' | 'token' | 'authenticating' | 'open' | 'ended'} */
  phase = 'opening';
  /** The token that was last sent. */
  token = '';
  /** Whether an `auth` has no reply. */
  asking = false;
  /** The number of early renewals in a row. */
  early = 0;
  /** Whether the broker has announced its shutdown. */
  leaving = false;
  /** When data last arrived, in the time of the core. */
  heard = 0;
  /** Its pings without a reply, and when they were sent. @type {Map<number, number>} */
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
  /** The requests to send. @type {string[]} */
  #outgoing = [];
  #parse;
  #ready;

  /**
   * @param {number} id @param {{url: string, kind: Kind}} route @param {(json: string) => any} parse
   * @param {(connection: Connection) => void} ready called when there is something to send after there was nothing
   */
  constructor(id, route, parse, ready) {
    this.id = id;
    this.#ready = ready;
    this.url = route.url;
    this.kind = route.kind;
    this.#parse = parse;
    this.main = new IncomingStream(this, false, parse);
  }

  /** The state of a stream; `undefined` is the main stream. @param {unknown} stream */
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

  /** Take everything that has to be sent. @returns {string[]} */
  take() {
    const texts = this.#outgoing;
    this.#outgoing = [];
    return texts;
  }

  /** Take the fields of `auth_ok`. @param {any} answer */
  accept(answer) {
    this.clientId = answer.client_id ?? null;
    this.producer = answer.producer ?? this.producer;
    this.limits = answer.limits ?? this.limits;
    this.floor = answer.floor ?? this.floor;
    this.advance(answer.head ?? 0, answer.epoch ?? '', this.main);
  }

  /**
   * Take head and epoch from a stream. The epoch of one stream may be older or newer than that of another.
   *
   * @param {number} seq @param {string} epoch @param {IncomingStream} incoming
   */
  advance(seq, epoch, incoming) {
    if (epoch === this.epoch) this.head = Math.max(seq, this.head);
    else if (epoch !== incoming.epoch) [this.head, this.epoch] = [seq, epoch];
    incoming.epoch = epoch;
  }
}
