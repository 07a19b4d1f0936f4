/**
 * The core of a client, with connections that are lost, slow and overtake each other, checked against a model.
 *
 * Connections are lost anywhere and follow each other in any order: each publish is in the log once and in its order,
 * each reply is true, each subscription receives exactly what it is owed, and nothing is left without a reply.
 */

import assert from 'node:assert/strict';

import { Log, Presence, Replica, matches } from './broker.js';
import { makeModelMaps } from './live_maps.js';

const CHANNELS = ['a.x', 'b'];
const PATTERNS = ['a.*', '*'];
/** Milliseconds of the model's time within which everything must settle. */
const SETTLE_LIMIT = 600_000;
const TOKEN_LIFE = 120;

export class World {
  now = 0;
  wall = 1e12;
  log = new Log();
  presence = new Presence();
  clients = { count: 0 };
  /** The replicas, by connection. */
  replicas = new Map();
  opening = [];
  tokens = [];
  tokensAsked = 0;
  opened = 0;
  publishes = [];
  requests = [];
  subscribers = [];
  memberships = [];
  clientId = 'alice';
  number = 0;
  running = false;
  /** Make the core. `modules` are those of the client, or of one with a planted mistake. */
  constructor(modules) {
    this.log.append('a.x', 'first', undefined, { retain: true });
    this.log.append('b', 'second', undefined, { retain: true });
    for (const channel of CHANNELS) for (const member of ['carol', 'dave']) this.presence.join(channel, member, 'elsewhere', 1);
    this.core = new modules.Core({
      routes: () => [{ url: 'ws://x', kind: 'websocket' }],
      won: () => {},
      upgradable: false,
      renewable: true,
      autoReconnect: true,
      reconnectDelay: 1000,
      maxReconnectDelay: 8000,
      reconnectJitter: 0,
      pingInterval: 30_000,
      pingTimeout: 10_000,
      offlineQueue: true,
      maxQueueSize: 1000,
      connectTimeout: 10_000,
      headStart: 300,
      upgradeInterval: 60_000,
      parse: JSON.parse,
      random: () => 0.5,
    });
    this.maps = makeModelMaps(modules, this);
    this.connect();
  }

  // Effects

  do(call) {
    this.core.advance(this.now, this.wall);
    const result = call(this.core);
    // The end of a map calls the core again.
    if (!this.busyWithEffects) this.carryOut();
    return result;
  }

  carryOut() {
    const { effects } = this.core;
    this.busyWithEffects = true;
    for (let at = 0; at < effects.length; at++) this.perform(effects[at]);
    this.busyWithEffects = false;
    effects.length = 0;
    for (const [connection, replica] of this.replicas) if (!replica.gone) replica.hear(connection.take());
    this.check();
  }

  perform([type, ...details]) {
    const [connection] = details;
    if (type === 'open') {
      this.opening.push(connection);
      this.opened++;
    } else if (type === 'token') {
      this.tokens.push(connection);
      this.tokensAsked++;
    } else if (type === 'close') {
      this.opening = this.opening.filter((each) => each !== connection);
      // What was sent before still arrives, and part of it is processed.
      const replica = this.replicas.get(connection);
      if (replica) {
        replica.hear(connection.take());
        replica.gone = true;
      }
    } else if (type === 'settle') {
      const [settler, error, value] = details;
      settler(error, value);
    } else if (type === 'notify') {
      const [target, what, value] = details;
      if (target.told) target.told(what, value);
      else target[what](value);
    }
  }

  // Calls of the application

  connect() {
    this.running = true;
    this.do((core) => core.connect(() => {}, Infinity));
  }

  /** From now on the outcome of these publishes may be unknown. */
  doubt() {
    for (const publish of this.publishes) publish.doubtful ||= !publish.result;
  }

  disconnect() {
    this.doubt();
    this.running = false;
    this.do((core) => core.disconnect());
  }

  /** Sign in under another client_id. */
  become(clientId) {
    this.disconnect();
    this.clientId = clientId;
    this.connect();
  }

  /** `expect`: with `retain`, the seq to expect, relative to that of the retained message; 0 is that one, null is none. */
  publish(channel, poisonous, { retain = false, expect } = {}) {
    const payload = poisonous ? 'poison' : ++this.number;
    const hanging = this.alive.some(([, { stuck }]) => stuck);
    // A client that does not know the new epoch yet names the old one.
    const outdated = this.log.epoch !== 'e1' && this.core.present?.epoch !== this.log.epoch;
    const present = this.log.retained(channel, Infinity).get(channel)?.seq ?? 0;
    const expected = expect === null ? 0 : expect === undefined ? undefined : present + expect;
    // A conflict does not say that an earlier try that expects no message was not published later.
    const doubtful = poisonous || hanging || outdated || expected === 0;
    const publish = { channel, payload, result: undefined, doubtful };
    this.publishes.push(publish);
    const settler = (error, value) => (publish.result = error ?? value);
    const more = `${retain ? ',"retain":true' : ''}${expected === undefined ? '' : `,"expect":${expected}`}`;
    this.do((core) => core.publish(`"channel":"${channel}","payload":${JSON.stringify(payload)}${more}}`, false, settler, expected === 0));
  }

  ask(call) {
    const request = { settled: false };
    this.requests.push(request);
    const settle = () => (request.settled = true);
    this.do((core) => call(core, settle));
  }

  subscribe(pattern, start) {
    if (this.open.length >= 5) return;
    // The history of an epoch that the client does not know is undefined.
    if (start.last !== undefined && this.log.epoch !== 'e1') return;
    const subscriber = new ModelSubscriber(pattern, start, this);
    this.subscribers.push(subscriber);
    subscriber.subscriber = this.do((core) => core.subscriptions.add(pattern, start, subscriber));
  }

  join(channel, info) {
    if (this.memberships.filter(({ over }) => !over).length >= 3) return;
    const membership = { holder: { channel, info: JSON.stringify(info), target: { ended: (why) => this.membershipEnded(membership, why) } }, waiting: 1, over: false };
    this.memberships.push(membership);
    this.do((core) => core.memberships.join(membership.holder, (error) => {
      membership.waiting--;
      if (!error) membership.owner = core.present.clientId;
    }));
  }

  updateMembership(membership, info) {
    membership.waiting++;
    this.do((core) => core.memberships.update(membership.holder, JSON.stringify(info), () => membership.waiting--));
  }

  leave(membership) {
    Object.assign(membership, { over: true, waiting: membership.waiting + 1 });
    this.do((core) => core.memberships.leave(membership.holder, () => membership.waiting--));
  }

  membershipEnded(membership, why) {
    membership.over = true;
    // The info of a handle is unknown to the broker while another one has a newer info.
    const shared = this.memberships.filter(({ holder }) => holder.channel === membership.holder.channel).length > 1;
    assert.ok(why.code === 'unauthorized' || (why.code === 'too_large' && (membership.owner === undefined || shared)), `a membership has ended: ${why.message}`);
  }

  get open() {
    return this.subscribers.filter(({ ended }) => !ended);
  }

  unsubscribe(subscriber) {
    const { settled } = subscriber;
    Object.assign(subscriber, { ended: true, left: true, unsubscribed: false });
    this.do((core) => core.subscriptions.remove(subscriber.subscriber, settled));
  }

  // Events of connections

  get alive() {
    return [...this.replicas].filter(([, { gone }]) => !gone);
  }

  openConnection(index) {
    const [connection] = this.opening.splice(index, 1);
    this.replicas.set(connection, new Replica(this.log, this.presence, this.clients, this.now));
    this.do((core) => core.opened(connection));
  }

  failConnection(index) {
    const [connection] = this.opening.splice(index, 1);
    this.do((core) => core.failed(connection, new Error('no way there')));
  }

  deliverToken(index) {
    const [connection] = this.tokens.splice(index, 1);
    const iat = this.serverTime;
    const claims = Buffer.from(JSON.stringify({ iat, exp: iat + TOKEN_LIFE })).toString('base64url');
    this.do((core) => core.gotToken(connection, JSON.stringify({ clientId: this.clientId, claims: `.${claims}.` })));
  }

  noToken(index) {
    const [connection] = this.tokens.splice(index, 1);
    this.do((core) => core.noToken(connection, new Error('no token now')));
  }

  get serverTime() {
    return 1e9 + this.now / 1000;
  }

  bring(connection, size) {
    const replica = this.replicas.get(connection);
    if (replica.silent) return;
    const text = replica.replies.slice(0, size);
    replica.replies = replica.replies.slice(size);
    if (text) this.do((core) => core.received(connection, text));
  }

  lose(connection, code) {
    this.replicas.get(connection).gone = true;
    this.endSessions();
    this.do((core) => core.closed(connection, code, ''));
  }

  /** The sessions that have ended are members of nothing any more: the grace is over. */
  endSessions() {
    for (const [, replica] of this.replicas) if (replica.gone) for (const channel of CHANNELS) this.presence.leave(channel, replica.clientId, replica);
  }

  goaway(connection) {
    const replica = this.replicas.get(connection);
    if (!replica.authenticated || replica.stopping) return;
    replica.say({ type: 'goaway', reason: 'stopping', reconnect_in: 0.5 });
  }

  restore(seq) {
    // What a subscriber with `last` is owed of a lost history is undefined.
    if (this.subscribers.some(({ start }) => start.last !== undefined)) return;
    this.doubt();
    this.log.restore(seq);
    // Requests of lost connections would be new to this log, which has lost its keys.
    for (const [, replica] of this.replicas) if (replica.gone) Object.assign(replica, { requests: [], flight: [] });
    for (const [, replica] of this.alive) replica.restored(this.log.head);
  }

  retain(count) {
    // What a subscriber with `last` is owed of what was deleted is undefined.
    if (!this.subscribers.some(({ start }) => start.last !== undefined)) this.log.retain(count);
  }

  wait(ms) {
    this.now += ms;
    this.wall += ms;
    this.do(() => {});
  }

  // Invariants

  /** At any moment. */
  check() {
    for (const subscriber of this.subscribers) if (subscriber.wrong) assert.fail(subscriber.wrong);
    const logs = [...this.log.epochs.values()];
    const unknown = new Set();
    for (const { channel, payload, result, doubtful } of this.publishes) {
      if (!result) continue;
      if (!(result instanceof Error)) {
        assert.ok(
          logs.some((entries) => entries[result.seq - 1]?.payload === payload && entries[result.seq - 1].channel === channel),
          `publish ${payload} was answered with a seq that is not its own`,
        );
      } else if (result.code === 'unknown') {
        assert.ok(doubtful, `publish ${payload} is in doubt: ${result.message}`);
        unknown.add(payload);
      } else assert.ok(!this.log.entries.some((entry) => entry.payload === payload), `publish ${payload} is refused (${result.code}) and in the log`);
    }
    const ours = this.log.entries.map(({ payload }) => payload).filter((payload) => typeof payload === 'number');
    assert.equal(new Set(ours).size, ours.length, 'a publish is in the log twice');
    const known = ours.filter((payload) => !unknown.has(payload));
    known.forEach((later, place) => {
      for (const earlier of known.slice(place + 1)) {
        const allowed = later < earlier || this.log.overtaking.get(earlier)?.has(later);
        assert.ok(allowed, `publish ${later} has overtaken ${earlier}`);
      }
    });
    const floor = this.opened + this.now / 1000 + 2;
    assert.ok(this.tokensAsked <= floor, `${this.tokensAsked} tokens in ${this.now / 1000} s`);
  }

  /** At the end, with working replicas: nothing is left without a reply, and every subscription receives. */
  finish() {
    for (const [, replica] of this.replicas) replica.databaseResponds();
    for (const [connection, replica] of this.alive) {
      if (replica.stopping) this.lose(connection, 4504);
      Object.assign(replica, { stuck: false, refusing: false });
    }
    for (const [, replica] of this.replicas) replica.full = false;
    for (const { subscriber, ended } of this.subscribers) if (!ended) this.do((core) => core.subscriptions.unpause(subscriber));
    if (!this.running) this.connect();
    this.settle();
    this.check();
    for (const subscriber of this.subscribers) subscriber.finish();
    this.maps.finish();
    this.finishMemberships();
    const wanted = new Set([...this.open, ...this.maps.open].map(({ pattern }) => pattern));
    for (const [, { held, silent }] of this.alive) if (!silent) assert.deepEqual(new Set(held.keys()), wanted, 'the broker sends to nobody');
  }

  /** The memberships of a channel that were not left. */
  heldIn(channel) {
    return this.memberships.filter(({ over, holder }) => !over && holder.channel === channel);
  }

  /** The infos of the sessions of this client in a channel. */
  infosIn(channel) {
    const sessions = [...(this.presence.channels.get(channel)?.get(this.clientId) ?? [])];
    return sessions.filter(([session]) => session !== 'elsewhere').map(([, info]) => info);
  }

  /** The client is a member of exactly those channels that it has joined and not left, once, and with the newest info. */
  finishMemberships() {
    this.endSessions();
    for (const channel of CHANNELS) {
      const infos = this.infosIn(channel);
      const held = this.heldIn(channel);
      for (const { owner } of held) assert.equal(owner, this.clientId, 'a membership belongs to somebody else');
      assert.equal(infos.length, held.length ? 1 : 0, `sessions of the member in ${channel}`);
      for (const info of infos) assert.ok(held.some(({ holder }) => holder.info === JSON.stringify(info)), `${channel} has the info ${info}`);
    }
  }

  /** Process everything until nothing is left to do. */
  settle() {
    const until = this.now + SETTLE_LIMIT;
    let turns = 0;
    while (this.turn() || !this.atRest()) {
      assert.ok(this.now < until && ++turns < 5000, `it does not come to rest: ${this.describe()}`);
      if (!this.busy && !this.atRest()) this.wait(Math.max(1, (this.core.timers.next ?? this.now) - this.now));
    }
  }

  /** Let time pass, with working replicas. */
  run(ms) {
    const until = this.now + ms;
    while (this.now < until) {
      for (let turns = 0; this.turn(); turns++) assert.ok(turns < 1000, `it does not come to rest: ${this.describe()}`);
      this.wait(Math.max(1, Math.min(this.core.timers.next ?? until, until) - this.now));
    }
  }

  /** Have every replica reply to its requests. Returns whether there is more. */
  turn() {
    this.endSessions();
    while (this.opening.length) this.openConnection(0);
    while (this.tokens.length) this.deliverToken(0);
    for (const [connection, replica] of this.alive) {
      replica.work(Infinity);
      replica.deliver(this.log.head);
      this.bring(connection, Infinity);
      replica.databaseResponds();
    }
    return this.busy;
  }

  get busy() {
    return this.opening.length > 0 || this.tokens.length > 0 || this.alive.some(([, { silent, requests, replies }]) => !silent && (requests.length || replies));
  }

  atRest() {
    if (this.core.state !== 'connected' || this.core.supervisor.next) return false;
    return !this.busy && !this.openEnds().length;
  }

  openEnds() {
    this.endSessions();
    return [
      ...this.publishes.filter(({ result }) => !result).map(({ payload }) => `publish ${payload}`),
      ...this.requests.filter(({ settled }) => !settled).map(() => 'a request'),
      ...this.memberships.filter(({ waiting }) => waiting).map(({ holder }) => `a membership of ${holder.channel}`),
      // A join that was rejected for now is sent again.
      ...CHANNELS.filter((channel) => this.heldIn(channel).length && !this.infosIn(channel).length).map((channel) => `${channel} is not joined`),
      ...this.maps.openEnds(),
      ...this.subscribers.filter((subscriber) => !subscriber.complete).map(({ pattern }) => `a subscription of ${pattern}`),
    ];
  }

  describe() {
    return `${this.core.state}, ${this.openEnds().join(', ') || 'nothing open'}`;
  }
}

/** The messages that one handler is owed. */
class ModelSubscriber {
  /** What it has received. */
  ended = false;
  left = false;
  /** The position up to which it is complete. */
  at;
  wrong;
  unsubscribed = true;

  constructor(pattern, start, world) {
    this.pattern = pattern;
    this.start = start;
    this.world = world;
    if (start.since !== undefined) this.at = { seq: start.since, epoch: start.epoch };
    this.settled = () => (this.unsubscribed = true);
  }

  told(what, value) {
    if (this.left) {
      if (what === 'message' || what === 'gap') this.wrong = `${this.pattern} was told of a ${what} after its end`;
      return;
    }
    if (what === 'started') return this.started(value);
    if (what === 'message') return this.message(value.message.seq, value.epoch);
    if (what === 'gap') return this.gap(value);
    if (what === 'ended') {
      this.ended = true;
      const mine = value?.code === 'unauthorized' && this.owner !== this.world.core.supervisor.identity;
      if (!mine) this.wrong = `${this.pattern} has ended: ${value?.message}`;
    }
  }

  /** Its start is settled by this notification. Later messages come after it. */
  started({ cursor: seq, epoch, owner }) {
    this.owner = owner;
    if (this.at) return;
    this.at = { seq, epoch };
    this.past = this.start.last !== undefined;
  }

  /** The history comes first: as much as there is when it gets the first message of it. */
  addPast() {
    if (!this.past) return;
    this.past = false;
    const past = this.world.log.after(this.pattern, 0).filter((each) => each <= this.at.seq);
    const first = past.at(-this.start.last) ?? past[0];
    if (first !== undefined) this.at.seq = first - 1;
  }

  /** The next seq that it is owed in an epoch. */
  next(epoch) {
    const { log } = this.world;
    const { seq, epoch: own } = this.at;
    if (own !== epoch && seq > log.common(own, epoch)) return undefined;
    return log.after(this.pattern, seq, epoch)[0];
  }

  message(seq, epoch) {
    this.addPast();
    const owed = this.next(epoch);
    if (seq !== owed) this.wrong ??= `${this.pattern} got ${seq} of ${epoch} after ${this.at.seq} of ${this.at.epoch}, and is owed ${owed}`;
    this.at = { seq, epoch };
  }

  gap({ to, epoch }) {
    const { log } = this.world;
    // What a restore has taken from the log since then is owed to nobody.
    const last = Math.min(to, this.at.epoch === epoch ? to : log.common(this.at.epoch, epoch));
    if (log.after(this.pattern, this.at.seq, this.at.epoch).some((seq) => seq <= last && seq > log.everDeleted)) this.wrong ??= `${this.pattern} was told of a gap that there is not`;
    this.at = { seq: to, epoch };
  }

  get complete() {
    if (this.ended) return this.unsubscribed;
    if (!this.at || this.subscriber.buffered) return false;
    this.addPast();
    const { log } = this.world;
    const lost = this.at.epoch !== log.epoch && this.at.seq > log.common(this.at.epoch, log.epoch);
    return !lost && this.next(log.epoch) === undefined && this.subscriber.phase === 'active' && this.subscriber.subscription.incoming !== undefined;
  }

  finish() {
    if (!this.ended) assert.equal(this.owner, this.world.clientId, `${this.pattern} belongs to somebody else`);
  }
}

export { CHANNELS, PATTERNS, matches };
