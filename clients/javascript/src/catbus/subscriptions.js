/**
 * The subscriptions of one client, which outlive its connections: which the broker has been asked to begin and to end, and
 * which handlers its answers are for.
 *
 * All handlers of a pattern are readers of one feed, which is one subscription on the wire. A feed hears one lane: that of
 * the newest `subscribe` that was agreed to. Only the newest one counts, so an answer that comes late, or from a
 * connection that another one has replaced, takes nothing away from it. There it was asked for with the lowest cursor of
 * its readers, so nothing is missing between, and each reader drops what is not above its own.
 *
 * @module
 */

import { ANOTHER_CLIENT, RefusedError, TRY_AGAIN } from './errors.js';
import { Feed, RETRY_PAUSE, fetchPast, tell } from './feeds.js';
import { STUCK } from './publishes.js';
import { Reader } from './readers.js';

/** @typedef {import('./link.js').Link} Link */
/** @typedef {import('./link.js').Lane} Lane */
/** @typedef {import('./core.js').Settler} Settler */
/** @typedef {import('./readers.js').Start} Start */

const LONGEST_RETRY = 10_000;

const nobody = () => {};

export class Subscriptions {
  #host;
  /** The connection to ask, if there is one. @type {Link | undefined} */
  #desk;
  /** The one before it, while the client moves: it may be needed again. @type {Link | undefined} */
  #before;
  /** @type {Map<string, Feed>} */
  #feeds = new Map();
  /** @type {Map<number, Feed>} */
  #asked = new Map();
  /** What waits for `unsubscribed`. @type {Map<number, Settler>} */
  #leaving = new Map();
  /** @type {Set<Feed>} */
  #again = new Set();

  /** @param {import('./feeds.js').Host} host */
  constructor(host) {
    this.#host = host;
  }

  /** Whether an agreement is still to come. */
  get asking() {
    return this.#asked.size + this.#again.size > 0;
  }

  // What the application asks

  /**
   * @param {string} pattern @param {Start & {stream?: boolean, datagrams?: boolean}} options
   * @param {any} owner @returns {Reader}
   */
  add(pattern, { stream = false, datagrams = false, ...start }, owner) {
    let feed = this.#feeds.get(pattern);
    if (!feed) this.#feeds.set(pattern, (feed = new Feed(pattern)));
    const reader = new Reader(feed, start, owner);
    feed.readers.add(reader);
    const more = (stream && !feed.stream) || (datagrams && !feed.datagrams);
    feed.stream ||= stream;
    feed.datagrams ||= datagrams;
    if (reader.cursor === undefined && feed.lane && !feed.crossing && feed.seq <= feed.lane.link.head && !more) {
      // From where it stands, or from where the replica stood where it has not caught up.
      this.#begin(reader, Math.max(feed.seq, feed.head), feed.lane.epoch, feed.lane.link);
      if (feed.live) this.#becomeLive(reader);
    } else if (reader.cursor !== undefined || !feed.asked || more || Number(feed.asked.since ?? 0) > feed.asked.link.head) {
      this.#ask(feed);
    }
    return reader;
  }

  /** End it from this side. @param {Reader} reader @param {Settler} settler settled when the broker knows */
  remove(reader, settler) {
    const { feed } = reader;
    const attached = reader.attached;
    this.#end(reader, undefined);
    if (attached && !feed.attached.length) this.#leave(feed, settler);
    else this.#host.settle(settler, undefined);
  }

  /** Have nothing sent to it for now. @param {Reader} reader */
  pause(reader) {
    if (!reader.attached) return;
    reader.phase = 'paused';
    if (!reader.feed.attached.length) this.#leave(reader.feed);
  }

  /** Go on from where it stands. @param {Reader} reader */
  goOn(reader) {
    if (reader.phase !== 'paused') return;
    reader.phase = 'waiting';
    reader.live = false;
    this.#ask(reader.feed);
  }

  /** End all that began under another client_id. @param {string | null} clientId */
  belongTo(clientId) {
    for (const reader of this.#readers()) {
      if (reader.owner === undefined || reader.owner === clientId) continue;
      this.#refuse(reader, new RefusedError('unauthorized', ANOTHER_CLIENT));
      if (!reader.feed.attached.length) this.#leave(reader.feed);
    }
  }

  /** End all of them. @param {Error} why */
  endAll(why) {
    for (const reader of this.#readers()) this.#end(reader, why);
  }

  // Between connections

  /** Another connection is there: ask it to go on. One before it is heard until the answer. @param {Link} desk */
  resume(desk) {
    this.#forgetAsked();
    this.#before = this.#desk;
    this.#desk = desk;
    for (const feed of this.#feeds.values()) if (feed.attached.length) this.#ask(feed);
  }

  /** A connection is gone, and what was heard there waits for the next one. @param {Link} link */
  lose(link) {
    for (const feed of this.#feeds.values()) if (feed.lane?.link === link) this.#silence(feed);
    if (this.#before === link) this.#before = undefined;
    if (this.#desk !== link) return;
    this.#desk = undefined;
    this.#forgetAsked();
  }

  // What the broker says

  /** @param {any} reply @param {Lane} lane */
  subscribed(reply, lane) {
    const feed = this.#answered(reply.id);
    if (!feed?.asked) return;
    const { since, epoch } = feed.asked;
    const moved = feed.lane?.link !== lane.link;
    feed.asked = undefined;
    feed.tries = 0;
    feed.lane = lane;
    if (lane.own) lane.feed = feed;
    feed.live = since === undefined;
    // A replica that is behind sends from `since` on, not from where it is.
    feed.head = epoch === lane.epoch ? Math.max(reply.seq, since ?? 0) : reply.seq;
    feed.seq = since ?? reply.seq;
    feed.crossing = since !== undefined && epoch !== lane.epoch;
    for (const reader of feed.attached) {
      const fresh = reader.phase === 'waiting';
      if (reader.cursor === undefined ? !feed.crossing : reader.isAfter(since ?? reply.seq, since === undefined ? lane.epoch : epoch, lane.epoch)) {
        if (moved || fresh) reader.live = false;
        this.#begin(reader, feed.head, lane.epoch, lane.link);
        if (feed.live) this.#becomeLive(reader);
      } else {
        // It stands elsewhere in another epoch, or nowhere yet: it is asked for when this subscription has caught up.
        reader.phase = 'waiting';
      }
    }
    if (feed.live) this.#askForTheRest(feed);
  }

  /** @param {any} reply @param {Link} link */
  unsubscribed(reply, link) {
    if (reply.id !== undefined) {
      this.#host.settle(this.#leaving.get(reply.id) ?? nobody, undefined);
      this.#leaving.delete(reply.id);
      return;
    }
    // Its own stream was not read for too long (a page may be frozen): it goes on from where it stands.
    const feed = this.#feeds.get(reply.pattern);
    if (feed?.lane?.link !== link) return;
    this.#silence(feed);
    if (link === this.#desk && !feed.asked && feed.attached.length) this.#ask(feed);
  }

  /** @param {number} id @param {RefusedError} reason @returns {boolean} whether it was one of these */
  refused(id, reason) {
    if (this.#leaving.has(id)) {
      this.unsubscribed({ id }, /** @type {any} */ (undefined));
      return true;
    }
    const feed = this.#answered(id);
    if (!feed) return false;
    feed.asked = undefined;
    if (TRY_AGAIN.has(reason.code)) {
      this.#again.add(feed);
      const { timers } = this.#host;
      const pause = Math.min(LONGEST_RETRY, RETRY_PAUSE * 2 ** Math.min(feed.tries++, 10));
      if (!timers.has('retry subscriptions')) timers.set('retry subscriptions', pause, () => this.#retry());
      return true;
    }
    const heard = feed.lane !== undefined && feed.lane.link === this.#desk;
    for (const reader of [...feed.readers]) this.#refuse(reader, reason);
    // A refused `subscribe` leaves the subscription that it was to replace.
    if (heard) this.#leave(feed);
    return true;
  }

  /** Whether what was asked long before `moment` has no answer. @param {number} moment */
  stuckBefore(moment) {
    return [...this.#asked.values()].some(({ asked }) => asked !== undefined && asked.at < moment - STUCK);
  }

  /** @param {any} reply @param {Lane} lane */
  revoked(reply, lane) {
    const feed = this.#heard(reply.pattern, lane);
    if (!feed) return;
    const reason = new RefusedError('revoked', 'the permission was withdrawn');
    // It was asked for anew, here or on the next connection.
    if (feed.asked) this.#leave(feed);
    for (const reader of [...feed.readers]) this.#end(reader, reason);
    this.#silence(feed);
    this.#host.emit('revoked', { pattern: reply.pattern, seq: reply.seq });
  }

  /** @param {any} message @param {Lane} lane */
  message(message, lane) {
    const { seq, pattern } = message;
    const feed = lane.feed ?? this.#feeds.get(pattern);
    if (!feed?.lane) return;
    if (seq === undefined) {
      // A datagram belongs to no stream.
      if (feed.lane.link !== lane.link) return;
      for (const reader of feed.heard) tell(this.#host, reader, 'message', { message, epoch: '' });
      return;
    }
    if (feed.lane !== lane) return;
    feed.seq = seq;
    for (const reader of feed.heard) {
      if (reader.take(seq, lane.epoch)) tell(this.#host, reader, 'message', { message, epoch: lane.epoch });
    }
  }

  /** @param {any} reply @param {Lane} lane */
  live(reply, lane) {
    const feed = this.#heard(reply.pattern, lane);
    if (!feed) return;
    feed.live = true;
    feed.crossing = false;
    feed.seq = reply.seq;
    for (const reader of feed.heard) {
      reader.move(reply.seq, lane.epoch);
      this.#becomeLive(reader);
    }
    this.#askForTheRest(feed);
  }

  /** @param {any} reply @param {Lane} lane */
  head(reply, lane) {
    for (const feed of lane.own ? [lane.feed] : this.#feeds.values()) {
      if (feed?.lane !== lane || !feed.live) continue;
      feed.seq = reply.seq;
      for (const reader of feed.heard) reader.move(reply.seq, reply.epoch);
    }
  }

  /** @param {any} reply @param {Lane} lane */
  gap(reply, lane) {
    const feed = this.#heard(reply.pattern, lane);
    if (!feed) return;
    const { pattern, epoch, reason } = reply;
    feed.seq = feed.head = reply.to;
    for (const reader of feed.heard) {
      const missing = reader.miss(reply);
      if (!missing) continue;
      const gap = { pattern, ...missing, epoch, reason };
      tell(this.#host, reader, 'gap', gap);
      this.#host.emit('gap', gap);
    }
  }

  // Helpers

  #readers() {
    return [...this.#feeds.values()].flatMap((feed) => [...feed.readers]);
  }

  /** Whose a pattern is, where this lane is heard for it. @param {string} pattern @param {Lane} lane */
  #heard(pattern, lane) {
    const feed = lane.feed ?? this.#feeds.get(pattern);
    return feed?.lane === lane ? feed : undefined;
  }

  /** Ask for what its readers are owed. @param {Feed} feed */
  #ask(feed) {
    const desk = this.#desk;
    if (!desk) return;
    this.#again.delete(feed);
    const { since, epoch } = feed.wish(desk);
    const id = this.#host.nextId();
    if (feed.asked) this.#asked.delete(feed.asked.id);
    feed.asked = { id, link: desk, at: this.#host.timers.now, since, epoch };
    this.#asked.set(id, feed);
    desk.send({
      type: 'subscribe',
      pattern: feed.pattern,
      ...(since !== undefined && { since, epoch }),
      ...(feed.stream && { stream: true }),
      ...(feed.datagrams && { datagrams: true }),
      id,
    });
  }

  /** @param {Feed} feed */
  #askForTheRest(feed) {
    if (!feed.asked && feed.attached.some(({ phase }) => phase === 'waiting')) this.#ask(feed);
  }

  #retry() {
    for (const feed of [...this.#again]) if (feed.attached.length) this.#ask(feed);
    this.#again.clear();
  }

  /** Nobody wants it any more, for now or for good. @param {Feed} feed @param {Settler} settler */
  #leave(feed, settler = nobody) {
    const desk = this.#desk;
    const known = feed.asked || (feed.lane && feed.lane.link === desk);
    if (feed.asked) this.#asked.delete(feed.asked.id);
    feed.asked = undefined;
    this.#again.delete(feed);
    this.#silence(feed);
    const { pattern } = feed;
    this.#before?.send({ type: 'unsubscribe', pattern, id: this.#host.nextId() });
    if (desk && known) {
      const id = this.#host.nextId();
      this.#leaving.set(id, settler);
      desk.send({ type: 'unsubscribe', pattern, id });
    } else {
      this.#host.settle(settler, undefined);
    }
  }

  /** It is not heard any more. @param {Feed} feed */
  #silence(feed) {
    if (feed.lane?.feed === feed) feed.lane.feed = undefined;
    feed.lane = undefined;
    feed.live = false;
  }

  /** Whom a reply is for, which comes once for each request. @param {number} id */
  #answered(id) {
    const feed = this.#asked.get(id);
    this.#asked.delete(id);
    return feed;
  }

  #forgetAsked() {
    for (const feed of this.#asked.values()) feed.asked = undefined;
    this.#asked.clear();
    this.#again.clear();
    this.#host.timers.cancel('retry subscriptions');
    for (const settler of this.#leaving.values()) this.#host.settle(settler, undefined);
    this.#leaving.clear();
  }

  /** @param {Reader} reader @param {number} seq @param {string} epoch @param {Link} link */
  #begin(reader, seq, epoch, link) {
    reader.place(seq, epoch);
    if (reader.begun) return;
    reader.begun = true;
    reader.owner = link.clientId;
    this.#host.tell(reader, 'begun', { cursor: reader.cursor, epoch: reader.epoch, owner: reader.owner });
    if (reader.last !== undefined) reader.held = [];
  }

  /** @param {Reader} reader */
  #becomeLive(reader) {
    if (reader.live) return;
    reader.live = true;
    if (reader.last !== undefined) {
      // Only now is it certain that the replica has what is below its cursor.
      fetchPast(this.#host, reader, reader.last, reader.start + 1);
      reader.last = undefined;
    }
    tell(this.#host, reader, 'live', undefined);
  }

  /** The broker would not have it. @param {Reader} reader @param {RefusedError} reason */
  #refuse(reader, reason) {
    const { begun, cursor, feed } = reader;
    this.#end(reader, reason);
    if (!begun) return;
    this.#host.emit('error', reason);
    if (reason.code === 'unauthorized') this.#host.emit('revoked', { pattern: feed.pattern, seq: cursor ?? 0 });
  }

  /** It gets nothing more. @param {Reader} reader @param {Error | undefined} why undefined: the application wants it so */
  #end(reader, why) {
    if (reader.phase === 'ended') return;
    const { feed } = reader;
    reader.phase = 'ended';
    reader.held = undefined;
    feed.readers.delete(reader);
    if (!feed.readers.size && this.#feeds.get(feed.pattern) === feed) this.#feeds.delete(feed.pattern);
    this.#host.tell(reader, 'ended', why);
  }
}
