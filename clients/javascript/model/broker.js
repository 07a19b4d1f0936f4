/**
 * A broker for the model: a log that all replicas share, and replicas that reply late, lag, hang and shut down.
 */

export const matches = (pattern, channel) =>
  pattern === '*' || pattern === channel || (pattern.endsWith('.*') && channel.startsWith(pattern.slice(0, -1)));

/** The log in all its epochs. */
export class Log {
  epoch = 'e1';
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

  append(channel, payload, key) {
    if (key !== undefined && this.keys.has(key)) return { seq: this.keys.get(key), duplicate: true };
    this.entries.push({ channel, payload });
    if (key !== undefined) this.keys.set(key, this.head);
    return { seq: this.head };
  }

  /** Note a sent publish. If it is sent again, everything sent before may precede it. */
  hear({ payload, retry }) {
    if (retry && !this.overtaking.has(payload)) this.overtaking.set(payload, new Set(this.sent));
    this.sent.add(payload);
  }

  /** Restore the database: entries above `seq` are lost, and a new epoch begins. */
  restore(seq) {
    const kept = this.entries.slice(0, seq);
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

  constructor(log, clients, now) {
    this.log = log;
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

  commit({ id, channel, payload, retry, epoch, ephemeral }) {
    if (ephemeral) return this.say({ type: 'published', channel, id });
    const key = `${this.producer} ${id}`;
    if (retry && epoch !== this.log.epoch && !this.log.keys.has(key)) {
      return this.say(refusal({ id, channel }, 'unknown'));
    }
    this.say({ type: 'published', channel, id, ...this.log.append(channel, payload, key) });
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

  subscribe({ pattern, since, epoch, id }) {
    this.say({ type: 'subscribed', pattern, seq: this.applied, epoch: this.log.epoch, id });
    let cursor = since ?? this.applied;
    if (since !== undefined && epoch !== this.log.epoch) {
      const common = this.log.common(epoch, this.log.epoch);
      if (since > common) {
        cursor = common;
        this.say({ type: 'gap', pattern, from: cursor + 1, to: cursor, epoch: this.log.epoch, reason: 'epoch' });
      }
    }
    this.held.set(pattern, { cursor, behind: since !== undefined });
    this.deliver(this.applied);
  }

  deliver(upto) {
    this.applied = Math.max(this.applied, Math.min(upto, this.log.head));
    for (const [pattern, subscription] of this.held) {
      for (const seq of this.log.after(pattern, subscription.cursor)) {
        if (seq > this.applied) break;
        const { channel, payload } = this.log.entries[seq - 1];
        this.say({ type: 'message', channel, payload, pattern, seq, at: 1 });
      }
      if (subscription.cursor <= this.applied && subscription.behind) {
        subscription.behind = false;
        this.say({ type: 'live', pattern, seq: this.applied });
      }
      subscription.cursor = Math.max(subscription.cursor, this.applied);
    }
  }

  head() {
    this.say({ type: 'head', seq: this.applied, epoch: this.log.epoch, at: 1 });
  }

  /** The log was restored. */
  restored(seq) {
    this.applied = Math.min(this.applied, seq);
    for (const [pattern, subscription] of this.held) {
      const to = Math.min(subscription.cursor, seq);
      this.say({ type: 'gap', pattern, from: to + 1, to, epoch: this.log.epoch, reason: 'epoch' });
      subscription.cursor = to;
    }
  }

  history({ pattern, limit = 100, before = Infinity, id }) {
    const seqs = this.log.after(pattern, 0).filter((seq) => seq < before);
    const page = seqs.slice(-Math.min(limit, 2)); // Pages are short, so that several are needed.
    const messages = page.map((seq) => ({ type: 'message', ...this.log.entries[seq - 1], pattern, seq, at: 1 }));
    this.say({ type: 'history', messages, more: page.length < seqs.length, id });
  }
}

function refusal({ id, channel }, code) {
  return { type: 'publish_error', channel, id, message: code, code };
}
