/**
 * A broker for the model: a log that all replicas share, and replicas that reply late, lag, hang and shut down.
 */

export const matches = (pattern, channel) =>
  pattern === '*' || pattern === channel || (pattern.endsWith('.*') && channel.startsWith(pattern.slice(0, -1)));

/** The log in all its epochs. */
export class Log {
  epoch = 'e1';
  /** The highest seq that retention has deleted. */
  deleted = 0;
  /** The same, also before the database was restored. */
  everDeleted = 0;
  /** No two entries have the same time. */
  #time = 0;
  /** The entries of each epoch. All epochs begin alike. */
  epochs = new Map([['e1', []]]);
  /** The seq at which each epoch began. The log is unchanged up to there. */
  began = new Map([['e1', 0]]);
  /** The payloads that have been sent. */
  sent = new Set();
  /** Payloads that may precede a publish that was rejected for now and whose reply was lost. */
  overtaking = new Map();
  /** The seqs of publishes, by producer id and id. */
  keys = new Map();

  get entries() {
    return this.epochs.get(this.epoch);
  }

  get head() {
    return this.entries.length;
  }

  append(channel, payload, key, { retain = false, expect } = {}) {
    if (key !== undefined && this.keys.has(key)) return { seq: this.keys.get(key), duplicate: true };
    const present = this.retained(channel, this.head).get(channel)?.seq ?? 0;
    if (expect !== undefined && expect !== present) return { conflict: present };
    this.entries.push({ channel, payload, retain, at: ++this.#time });
    if (key !== undefined) this.keys.set(key, this.head);
    return { seq: this.head };
  }

  /** The retained messages up to a seq of an epoch: what a map shows that is fed with all of its messages. */
  retained(pattern, upto, epoch = this.epoch) {
    const found = new Map();
    for (const seq of this.after(pattern, 0, epoch)) {
      const { channel, payload, retain, at } = this.epochs.get(epoch)[seq - 1];
      if (seq > upto || !retain) continue;
      if (payload === null) found.delete(channel);
      else found.set(channel, { payload, seq, at });
    }
    return found;
  }

  /** Delete the oldest entries. */
  retain(count) {
    this.deleted = Math.min(this.deleted + count, this.head);
    this.everDeleted = Math.max(this.deleted, this.everDeleted);
  }

  /** Note a sent publish. If it is sent again, everything sent before may precede it. */
  hear({ payload, retry }) {
    if (retry && !this.overtaking.has(payload)) this.overtaking.set(payload, new Set(this.sent));
    this.sent.add(payload);
  }

  /** Restore the database: entries above `seq` are lost, and a new epoch begins. */
  restore(seq) {
    const kept = this.entries.slice(0, seq);
    this.deleted = Math.min(this.deleted, seq);
    this.epoch = `e${this.epochs.size + 1}`;
    this.epochs.set(this.epoch, kept);
    this.began.set(this.epoch, kept.length);
    for (const [key, place] of this.keys) if (place > kept.length) this.keys.delete(key);
  }

  /** The seq up to which an epoch and a later one are the same. */
  common(epoch, later) {
    const names = [...this.epochs.keys()];
    const between = names.slice(names.indexOf(epoch) + 1, names.indexOf(later) + 1);
    return Math.min(Infinity, ...between.map((name) => this.began.get(name)));
  }

  /** The seqs after a position that match. */
  after(pattern, seq, epoch = this.epoch) {
    const found = [];
    this.epochs.get(epoch).forEach(({ channel }, index) => {
      if (index + 1 > seq && matches(pattern, channel)) found.push(index + 1);
    });
    return found;
  }
}

/** The members of all channels, on all replicas. */
export class Presence {
  /** The info of each session, by channel and by member. */
  channels = new Map();
  /** The channels and members that have changed, oldest first. */
  changes = [];

  join(channel, member, session, info) {
    const members = this.channels.get(channel) ?? new Map();
    this.channels.set(channel, members);
    const sessions = members.get(member) ?? new Map();
    // The newest info is the last one.
    sessions.delete(session);
    members.set(member, sessions.set(session, info));
    this.changes.push([channel, member]);
  }

  leave(channel, member, session) {
    const sessions = this.channels.get(channel)?.get(member);
    if (!sessions?.delete(session)) return;
    if (!sessions.size) this.channels.get(channel).delete(member);
    this.changes.push([channel, member]);
  }

  /** The member as the broker describes it, or undefined. */
  describe(channel, member) {
    const sessions = this.channels.get(channel)?.get(member);
    const [info] = [...(sessions?.values() ?? [])].reverse();
    return sessions && { channel, client_id: member, sessions: sessions.size, info };
  }

  /** All members that match, in the order of their positions. */
  members(pattern) {
    return [...this.channels].sort().filter(([channel]) => matches(pattern, channel))
      .flatMap(([channel, members]) => [...members.keys()].sort().map((member) => this.describe(channel, member)));
  }
}

const positionOf = ({ channel, client_id: member }) => `${channel} ${member}`;

/** The broker's end of one connection. */
export class Replica {
  authenticated = false;
  stopping = false;
  /** Whether the database does not reply. */
  stuck = false;
  /** The number of publishes that it rejects next. */
  busy = 0;
  /** Whether it rejects subscriptions for now. */
  refusing = false;
  /** Whether its send queue takes no changes of members. */
  full = false;
  /** Whether it rejects invalid objects without their id, as an older broker does. */
  old = false;
  gone = false;
  /** Whether the network drops everything in both directions, without an error. */
  silent = false;
  /** Publishes at the database, which may commit them after the connection is lost. */
  flight = [];
  held = new Map();
  requests = [];
  replies = '';

  constructor(log, presence, clients, now) {
    this.log = log;
    this.presence = presence;
    /** How many changes of members it has announced. */
    this.announced = presence.changes.length;
    this.clients = clients;
    this.applied = log.head;
    this.now = now;
  }

  say(...objects) {
    for (const object of objects) this.replies += `${JSON.stringify(object)}\n`;
  }

  hear(texts) {
    for (const text of texts) {
      const request = JSON.parse(text);
      this.requests.push(request);
      if (request.type === 'publish') this.log.hear(request);
    }
  }

  work(count) {
    if (this.silent) return;
    for (const request of this.requests.splice(0, count)) this.answer(request);
  }

  answer(request) {
    const { type, id, pattern } = request;
    switch (type) {
      case 'auth':
        return this.auth(request);
      case 'publish':
        if (request.payload === 'poison') {
          // Some brokers do not reply.
          if (this.old && id % 2) return undefined;
          return this.say({ type: 'error', message: 'not understood', code: 'bad_message', ...(!this.old && { id }) });
        }
        if (this.stopping) return this.say(refusal(request, 'shutting_down'));
        if (this.busy) {
          this.busy--;
          return this.say(refusal(request, request.retry ? 'unknown' : 'overloaded'));
        }
        return this.stuck ? void this.flight.push(request) : this.commit(request);
      case 'subscribe':
        if (this.refusing) return this.say({ type: 'subscribe_error', pattern, id, message: 'not now', code: 'unavailable' });
        return this.subscribe(request);
      case 'join':
        if (this.busy) {
          this.busy--;
          return this.say({ type: 'error', id, message: 'not now', code: 'overloaded' });
        }
        if (request.info === 'wrong') return this.say({ type: 'error', id, message: 'too long', code: 'too_large' });
        this.presence.join(request.channel, this.clientId, this, request.info);
        return this.say({ type: 'joined', channel: request.channel, id });
      case 'leave':
        this.presence.leave(request.channel, this.clientId, this);
        return this.say({ type: 'left', channel: request.channel, id });
      case 'members':
        return this.say({ type: 'members', members: this.presence.members(pattern), id });
      case 'unsubscribe':
        this.held.delete(pattern);
        return this.say({ type: 'unsubscribed', pattern, seq: this.applied, id });
      case 'history':
        return this.history(request);
      case 'ping':
        this.say({ type: 'pong', seq: request.seq });
        if (![...this.held.values()].some(({ behind }) => behind)) this.head();
        return undefined;
      default:
        throw new Error(`the client said ${type}`);
    }
  }

  auth({ token, producer }) {
    const { clientId } = JSON.parse(token);
    this.authenticated = true;
    this.clientId = clientId;
    this.producer ??= producer?.startsWith(`${clientId}/`) ? producer : `${clientId}/${++this.clients.count}`;
    this.say({
      type: 'auth_ok',
      client_id: clientId,
      producer: this.producer,
      epoch: this.log.epoch,
      head: this.applied,
      floor: 1,
      limits: { pending_publishes: 5 },
    });
  }

  commit({ id, channel, payload, retry, epoch, ephemeral, retain, expect }) {
    if (ephemeral) return this.say({ type: 'published', channel, id });
    const key = `${this.producer} ${id}`;
    if (retry && epoch !== this.log.epoch && !this.log.keys.has(key)) {
      return this.say(refusal({ id, channel }, 'unknown'));
    }
    const { conflict, ...result } = this.log.append(channel, payload, key, { retain, expect });
    if (conflict === undefined) this.say({ type: 'published', channel, id, ...result });
    else this.say({ ...refusal({ id, channel }, 'conflict'), seq: conflict });
  }

  /** The database replies, whether the client is connected or not. */
  databaseResponds() {
    this.stuck = false;
    for (const request of this.flight.splice(0)) this.commit(request);
  }

  /** Publishes time out: their outcome is unknown. */
  giveUp() {
    for (const request of this.flight) this.say(refusal(request, 'unknown'));
  }

  subscribe({ pattern, since, epoch, id, retained = false, presence = false }) {
    const before = this.held.get(pattern);
    const cursor = since ?? Math.min(this.applied, (retained ? before?.cursor : undefined) ?? Infinity);
    this.say({ type: 'subscribed', pattern, seq: since === undefined ? cursor : this.applied, epoch: this.log.epoch, id });
    const subscription = { cursor, behind: since !== undefined || retained, retained, presence };
    // `after`: the channel and the member up to which the pages of a snapshot were sent; undefined: there is none to send.
    subscription.after = retained && since === undefined ? '' : undefined;
    subscription.position = presence ? '' : undefined;
    this.held.set(pattern, subscription);
    if (since !== undefined && epoch !== this.log.epoch) {
      const common = this.log.common(epoch, this.log.epoch);
      if (since > common) this.gap(pattern, subscription, common + 1, common, 'epoch');
    }
    this.deliver(this.applied);
  }

  gap(pattern, subscription, from, to, reason) {
    this.say({ type: 'gap', pattern, from, to, epoch: this.log.epoch, reason });
    subscription.cursor = to;
    if (!subscription.retained) return;
    subscription.after = '';
    subscription.behind = true;
  }

  deliver(upto) {
    this.applied = Math.max(this.applied, Math.min(upto, this.log.head), this.log.deleted);
    for (const [pattern, subscription] of this.held) {
      if (subscription.cursor < this.log.deleted) this.gap(pattern, subscription, subscription.cursor + 1, this.log.deleted, 'retention');
      if (!this.sendRetained(pattern, subscription)) continue;
      for (const seq of this.log.after(pattern, subscription.cursor)) {
        if (seq > this.applied) break;
        const { channel, payload, retain, at } = this.log.entries[seq - 1];
        this.say({ type: 'message', channel, payload, pattern, seq, at, ...(retain && { retain }) });
      }
      if (Math.max(subscription.cursor, subscription.until ?? 0) <= this.applied && subscription.behind) {
        subscription.behind = false;
        this.say({ type: 'live', pattern, seq: this.applied });
      }
      subscription.cursor = Math.max(subscription.cursor, this.applied);
    }
    this.announce();
  }

  /** Send a page of retained messages, if there is one to send. Returns whether messages may follow. */
  sendRetained(pattern, subscription) {
    const { after, cursor } = subscription;
    if (after === undefined) return true;
    const rows = [...this.log.retained(pattern, Infinity)].sort().filter(([channel, { seq }]) => channel > after && seq <= cursor);
    const page = rows.slice(0, 1);
    subscription.after = page.at(-1)?.[0] ?? after;
    const complete = page.length === rows.length;
    if (complete) subscription.after = undefined;
    // What was left out comes before `live`.
    subscription.until = this.log.head;
    const messages = page.map(([channel, row]) => ({ type: 'message', channel, ...row, retain: true }));
    this.say({ type: 'retained', pattern, messages, complete });
    return complete;
  }

  /** Announce the changes of members, and send a page of each snapshot of them. */
  announce() {
    const { changes } = this.presence;
    const changed = new Map(changes.slice(this.announced).map((change) => [change.join(), change]));
    this.announced = changes.length;
    for (const [pattern, subscription] of this.held) {
      if (!subscription.presence) continue;
      for (const [channel, member] of changed.values()) if (matches(pattern, channel)) this.sendChange(pattern, subscription, channel, member);
      if (subscription.position === undefined || this.full) continue;
      const rest = this.presence.members(pattern).filter((member) => positionOf(member) > subscription.position);
      const members = rest.slice(0, 1);
      const complete = members.length === rest.length;
      this.say({ type: 'members', pattern, members, complete });
      if (!complete) subscription.position = positionOf(members[0]);
      else {
        subscription.position = subscription.again ? '' : undefined;
        subscription.again = false;
      }
    }
  }

  sendChange(pattern, subscription, channel, member) {
    const present = this.presence.describe(channel, member);
    const object = { channel, client_id: member, sessions: 0, ...present };
    // A later page shows it.
    if (subscription.position !== undefined && positionOf(object) > subscription.position) return;
    // A full send queue takes no change: another snapshot follows.
    if (this.full && subscription.position === undefined) subscription.position = '';
    else if (this.full) subscription.again = true;
    else this.say({ type: 'presence', pattern, action: present ? 'update' : 'leave', ...object });
  }

  head() {
    this.say({ type: 'head', seq: this.applied, epoch: this.log.epoch, at: 1 });
  }

  /** The log was restored. */
  restored(seq) {
    this.applied = Math.min(this.applied, seq);
    for (const [pattern, subscription] of this.held) {
      const to = Math.min(subscription.cursor, seq);
      this.gap(pattern, subscription, to + 1, to, 'epoch');
    }
  }

  history({ pattern, limit = 100, before = Infinity, id }) {
    const seqs = this.log.after(pattern, 0).filter((seq) => seq < before);
    const page = seqs.slice(-Math.min(limit, 2)); // Pages are short, so that several are needed.
    const messages = page.map((seq) => ({ type: 'message', ...this.log.entries[seq - 1], pattern, seq }));
    this.say({ type: 'history', messages, more: page.length < seqs.length, id });
  }
}

function refusal({ id, channel }, code) {
  return { type: 'publish_error', channel, id, message: code, code };
}
