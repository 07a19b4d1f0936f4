// @ts-check
/**
 * The Catbus client for browsers, workers and Node: WebTransport first, WebSocket when it must be.
 *
 * It speaks `catbus.v1` (protocol/README.md; sections are named where a rule comes from), runs as it stands from
 * `<script type="module">`, and depends on nothing.
 *
 * From the bottom up: errors, the splitter of objects, the two transports, a link (one authenticated connection), and the
 * client, which has one link at a time, and two while it moves from one to the other.
 *
 * @module
 */

/**
 * @typedef {'disconnected' | 'connecting' | 'authenticating' | 'connected' | 'reconnecting'} ConnectionState
 *
 * @typedef {object} Options
 * @property {string} url Where the broker is: `https://` for WebTransport, `ws://` or `wss://` for WebSocket.
 * @property {string} [fallbackUrl] A WebSocket (`ws://`, `wss://`) for where no UDP gets through.
 * @property {string | (() => string | Promise<string>)} token Who you are. A function is asked for a new one whenever one
 *   is needed, and some time before the present one expires.
 * @property {boolean} [autoReconnect] Whether a lost connection is made again; true unless said otherwise.
 * @property {number} [reconnectDelay] Milliseconds before the first try to reconnect: 1000. It doubles with each try.
 * @property {number} [maxReconnectDelay] Milliseconds at the most: 30000.
 * @property {number} [reconnectJitter] By which part of it a delay varies at random: 0.3.
 * @property {number} [pingInterval] Milliseconds between pings: 30000.
 * @property {number} [pingTimeout] Milliseconds without any answer to a ping until the connection counts as lost: 10000.
 * @property {boolean} [offlineQueue] Whether what is published without a connection waits for one; true unless said
 *   otherwise.
 * @property {number} [maxQueueSize] How many messages may wait for a connection: 100.
 * @property {number} [connectTimeout] Milliseconds for one try to connect and to authenticate: 10000.
 * @property {number} [headStart] Milliseconds for which WebTransport is tried alone: 300.
 * @property {number} [upgradeInterval] Milliseconds after which a session over the fallback tries WebTransport again:
 *   60000.
 * @property {string} [discovery] The HTTP origin of a broker with a certificate of its own making, whose hash is asked
 *   for there. Found by itself where `url` is on this machine.
 * @property {WebTransportHash[]} [serverCertificateHashes] As WebTransport takes them; nothing is asked for then.
 * @property {new (url: string) => WebSocket} [WebSocket] A constructor, where there is no global one (Node before 22).
 * @property {new (url: string, options?: WebTransportOptions) => WebTransport} [WebTransport] The same.
 *
 * @typedef {object} Message
 * @property {string} channel
 * @property {any} payload
 * @property {string} pattern The subscription's pattern that it came for.
 * @property {number | undefined} seq Its place in the log; an ephemeral one has none.
 * @property {number | undefined} at When it was committed, in milliseconds since 1970, by the log's clock.
 * @property {string | undefined} sender The publisher's `client_id`, where it has one.
 *
 * @typedef {object} Gap What may be missing from a subscription.
 * @property {string} pattern
 * @property {number} from
 * @property {number} to
 * @property {string} epoch
 * @property {string} reason `retention`: it was deleted; `epoch`: the log is another one; `repair`: it was deleted by hand.
 *
 * @typedef {object} SubscribeOptions
 * @property {number} [since] First everything after this seq, then what is new.
 * @property {string} [epoch] The epoch of `since`.
 * @property {boolean} [stream] WebTransport: a stream of its own, so that no other subscription holds it up.
 * @property {boolean} [datagrams] WebTransport: ephemeral messages as datagrams.
 * @property {(gap: Gap) => void} [onGap] Told of what may be missing, before anything that comes after it.
 *
 * @typedef {object} Subscription
 * @property {string} pattern
 * @property {number | undefined} cursor Complete up to here: `since` for another time.
 * @property {string | undefined} epoch The epoch of the cursor.
 * @property {() => Promise<void>} unsubscribe
 *
 * @typedef {object} Events
 * @property {ConnectionState} state The state is another one.
 * @property {'webtransport' | 'websocket'} transport Connected, by this.
 * @property {Gap} gap What may be missing from a subscription.
 * @property {{pattern: string, seq: number}} revoked The permission for a subscription was withdrawn; it has ended.
 * @property {{reason: string, reconnectIn: number}} goaway The replica is about to stop: the client moves by itself.
 * @property {Error} error Something went wrong that nobody waits for: a try to connect, a subscription that came to an end.
 */

/** What all errors of this client are. `code` is one of section 10 of the specification, or a word of the client's own. */
export class CatbusError extends Error {
  /** @param {string} code @param {string} message */
  constructor(code, message) {
    super(message);
    this.name = new.target.name;
    this.code = code;
  }
}

/** The broker has refused a request. After `unknown`, a message may have been published. */
export class Refused extends CatbusError {
  /** @param {string} code @param {string} message @param {number} [retryAfter] seconds */
  constructor(code, message, retryAfter) {
    super(code, message);
    this.retryAfter = retryAfter;
  }
}

/** There is no connection. `final`: the client does not come back by itself. `closeCode`: as section 11 has it. */
export class Disconnected extends CatbusError {
  /** @param {string} message @param {{closeCode?: number, final?: boolean, code?: string}} [more] */
  constructor(message, { closeCode, final = false, code = 'disconnected' } = {}) {
    super(code, message);
    this.closeCode = closeCode;
    this.final = final;
  }
}

const PROTOCOL = 1;
/** For how long it is remembered which transport has won, in milliseconds. */
const MEMORY = 600_000;
/** What a token has left when a new one is asked for: milliseconds at the most, and a part of its life. */
const REFRESH_BEFORE = 30_000;
const SHORTEST_REFRESH = 1000;
const TRY_AGAIN = new Set(['rate_limited', 'overloaded', 'unavailable', 'unknown']);
/** A token that is refused by one of these is no better later (section 10). A code that is not known counts as `internal`. */
const FINAL = new Set([
  'bad_message',
  'unauthenticated',
  'unauthorized',
  'invalid_channel',
  'invalid_pattern',
  'too_large',
  'token_expired',
  'revoked',
  'limit',
]);
/** How long to wait, in milliseconds, where the broker says that the token is not valid yet. */
const LONGEST_WAIT = 300_000;
const RETRY_PAUSE = 500;
/** Without these, what was sent was wrong, and would be again (section 11). */
const WRONG = new Set([1002, 1003, 1007, 1009]);
const FOREVER = 2 ** 31 - 1;
/** How deep a message may be nested, itself counted (section 4). */
const MAX_DEPTH = 64;
/** What `JSON.stringify` makes of a surrogate that stands alone; a backslash may itself be escaped. */
const HALF_A_PAIR = /(?:^|[^\\])(?:\\\\)*\\ud[89a-f]/;

const encoder = new TextEncoder();

// Objects

/**
 * Cuts a stream of text into JSON objects, which end where their braces balance and nowhere else (section 4).
 *
 * Every character is looked at once, however the text comes in pieces.
 */
export class Splitter {
  #rest = '';
  #looked = 0;
  #depth = 0;
  #quoted = false;

  /**
   * Have `take` called with each object that is whole by now. Throws where something else stands, after what was before it.
   *
   * @param {string} text @param {(object: any) => void} take
   */
  feed(text, take) {
    let rest = this.#rest + text;
    let start = 0;
    const marks = /["\\{}]/g;
    marks.lastIndex = this.#looked;
    for (;;) {
      if (this.#depth === 0) {
        // Between objects nothing but white space may stand.
        while (start < rest.length && ' \t\r\n'.includes(rest[start])) start++;
        if (start === rest.length) break;
        if (rest[start] !== '{') throw new CatbusError('bad_message', 'the broker sent something other than objects');
        marks.lastIndex = start + 1;
        this.#depth = 1;
      }
      const mark = marks.exec(rest);
      if (mark === null) {
        marks.lastIndex = rest.length;
        break;
      }
      const character = mark[0];
      if (character === '\\') {
        if (marks.lastIndex === rest.length) {
          marks.lastIndex--; // What it escapes has not come yet.
          break;
        }
        marks.lastIndex++;
      } else if (character === '"') {
        this.#quoted = !this.#quoted;
      } else if (!this.#quoted) {
        this.#depth += character === '{' ? 1 : -1;
        if (this.#depth === 0) {
          const end = marks.lastIndex;
          take(JSON.parse(rest.slice(start, end)));
          marks.lastIndex = start = end;
        }
      }
    }
    this.#rest = rest.slice(start);
    this.#looked = this.#depth ? Math.max(0, marks.lastIndex - start) : 0;
  }
}

// Transports

/**
 * What a link is told. `stream` stands for one of the broker's own streams, and is undefined for the session's.
 *
 * @typedef {object} Receiver
 * @property {(text: string, stream?: Stream) => void} onText
 * @property {(object: any) => void} onDatagram
 * @property {(code: number, reason: string) => void} onClose
 *
 * @typedef {object} Stream A stream of the broker's, for one subscription.
 * @property {Splitter} splitter
 * @property {string | undefined} epoch
 * @property {Feed | undefined} feed
 *
 * @typedef {object} Transport
 * @property {'webtransport' | 'websocket'} kind
 * @property {(receiver: Receiver) => void} start
 * @property {(text: string) => void} send
 * @property {(code: number, reason: string) => void} close
 */

/**
 * @param {string} url @param {new (url: string) => WebSocket} constructor @param {AbortSignal} signal
 * @returns {Promise<Transport>}
 */
function openWebSocket(url, constructor, signal) {
  return new Promise((resolve, reject) => {
    const socket = new constructor(url);
    const abort = () => {
      socket.close();
      reject(signal.reason);
    };
    signal.addEventListener('abort', abort, { once: true });
    socket.onerror = () => {};
    socket.onclose = () => reject(new Disconnected(`cannot connect to ${url}`));
    socket.onopen = () => {
      signal.removeEventListener('abort', abort);
      resolve({
        kind: 'websocket',
        start({ onText, onClose }) {
          socket.onmessage = (event) => onText(event.data);
          socket.onclose = (event) => onClose(event.code, event.reason);
        },
        send: (text) => socket.send(text),
        // A browser takes 1000 and 3000 to 4999 from us.
        close: (code, reason) => socket.close(code === 0 ? 1000 : code, reason),
      });
    };
  });
}

/**
 * @param {string} url @param {new (url: string, options?: WebTransportOptions) => WebTransport} constructor
 * @param {WebTransportHash[] | undefined} hashes @param {AbortSignal} signal
 * @returns {Promise<Transport>}
 */
async function openWebTransport(url, constructor, hashes, signal) {
  const session = new constructor(url, hashes ? { serverCertificateHashes: hashes } : {});
  const closed = session.closed.then(
    ({ closeCode = 0, reason = '' }) => ({ code: closeCode, reason }),
    (error) => ({ code: 1006, reason: `${error?.message ?? error}` }),
  );
  const abort = () => session.close();
  signal.addEventListener('abort', abort, { once: true });
  try {
    await session.ready;
    const main = await session.createBidirectionalStream();
    signal.throwIfAborted();
    const writer = main.writable.getWriter();
    return {
      kind: 'webtransport',
      start({ onText, onDatagram, onClose }) {
        // Each of these ends with the session, which `closed` tells of.
        readText(main.readable, (text) => onText(text)).catch(ignore);
        read(session.incomingUnidirectionalStreams, (readable) => {
          /** @type {Stream} */
          const stream = { splitter: new Splitter(), epoch: undefined, feed: undefined };
          readText(readable, (text) => onText(text, stream)).catch(ignore);
        }).catch(ignore);
        const decoder = new TextDecoder();
        read(session.datagrams.readable, (data) => {
          try {
            onDatagram(JSON.parse(decoder.decode(data)));
          } catch {
            // What makes no sense is one datagram, and no reason to read no other.
          }
        }).catch(ignore);
        closed.then(({ code, reason }) => onClose(code, reason));
      },
      send: (text) => void writer.write(encoder.encode(text)).catch(ignore),
      close: (closeCode, reason) => session.close({ closeCode, reason }),
    };
  } catch (error) {
    if (signal.aborted) throw signal.reason;
    throw new Disconnected(`cannot connect to ${url}: ${error instanceof Error ? error.message : error}`);
  } finally {
    signal.removeEventListener('abort', abort);
  }
}

/** @template T @param {ReadableStream<T>} readable @param {(value: T) => void} take */
async function read(readable, take) {
  const reader = readable.getReader();
  for (let next = await reader.read(); !next.done; next = await reader.read()) take(next.value);
}

/** @param {ReadableStream<Uint8Array>} readable @param {(text: string) => void} take */
async function readText(readable, take) {
  const decoder = new TextDecoder();
  await read(readable, (data) => take(decoder.decode(data, { stream: true })));
}

function ignore() {}

// A link

/**
 * One connection, from `auth` to its end. Requests are answered by `id`; everything else is handed to its client.
 */
class Link {
  producer = '';
  epoch = '';
  head = 0;
  floor = 0;
  /** @type {Record<string, number>} */
  limits = {};
  /** @type {string | null} */
  clientId = null;
  /** Set when it has ended: why. @type {Disconnected | undefined} */
  ended;
  /** Resolves when it has ended, with why. @type {Promise<Disconnected>} */
  closed;
  /** Ends the pauses of whoever waits on its account. */
  over;
  heard = performance.now();
  /** Ids of publishes that were sent on it and have no answer. @type {Set<number>} */
  publishing = new Set();
  /** Those of them that were sent before, and hold up the newer ones. @type {Set<number>} */
  retrying = new Set();

  #splitter = new Splitter();
  #transport;
  #client;
  /** @type {(reason: Disconnected) => void} */
  #close = ignore;
  #over = new AbortController();
  /** @type {Map<number, {resolve: (answer: any) => void, reject: (error: Error) => void, feed?: Feed}>} */
  #requests = new Map();
  /** @type {Map<number, {resolve: (answer: any) => void, reject: (error: Error) => void}>} */
  #pings = new Map();
  #idle = ignore;
  /** @type {{resolve: (answer: any) => void, reject: (error: Error) => void} | undefined} */
  #auth;
  #numbers = 0;

  /** @param {Transport} transport @param {LinkOwner} client */
  constructor(transport, client) {
    this.#transport = transport;
    this.#client = client;
    this.over = this.#over.signal;
    this.closed = new Promise((resolve) => (this.#close = resolve));
    transport.start({
      onText: (text, stream) => this.#take(text, stream),
      onDatagram: (object) => this.#client.deliver(this, object, undefined),
      onClose: (code, reason) => this.#end(code, reason),
    });
  }

  get kind() {
    return this.#transport.kind;
  }

  /** @param {string} token @param {string | undefined} producer */
  async authenticate(token, producer) {
    /** @type {any} */
    const answer = await new Promise((resolve, reject) => {
      if (this.ended) return reject(this.ended);
      this.#auth = { resolve, reject };
      this.send({ type: 'auth', token, protocol: PROTOCOL, ...(producer && { producer }) });
    });
    this.clientId = answer.client_id;
    this.producer = answer.producer ?? '';
    this.epoch = answer.epoch ?? '';
    this.head = answer.head ?? 0;
    this.floor = answer.floor ?? 0;
    this.limits = answer.limits ?? {};
  }

  /** Ask for something, and wait for the answer. @param {object} message @param {Feed} [feed] @returns {Promise<any>} */
  request(message, feed) {
    return new Promise((resolve, reject) => {
      if (this.ended) return reject(this.ended);
      const id = ++this.#numbers;
      this.#requests.set(id, { resolve, reject, feed });
      this.send({ ...message, id });
    });
  }

  /** @returns {Promise<number>} milliseconds */
  ping() {
    return new Promise((resolve, reject) => {
      if (this.ended) return reject(this.ended);
      const seq = ++this.#numbers;
      const began = performance.now();
      this.#pings.set(seq, { resolve: () => resolve(performance.now() - began), reject });
      this.send({ type: 'ping', seq });
    });
  }

  /** @param {object} message */
  send(message) {
    this.sendText(JSON.stringify(message));
  }

  /** @param {string} text */
  sendText(text) {
    if (!this.ended) this.#transport.send(text);
  }

  /** End it: nothing that comes after this counts. @param {Disconnected} [why] @param {number} [code] */
  close(why = new Disconnected('closed by this client'), code = 0) {
    if (this.ended) return;
    this.#finish(why);
    this.#transport.close(code, '');
  }

  /** @param {number} code @param {string} reason */
  #end(code, reason) {
    const final = (code >= 4000 && code < 4400) || WRONG.has(code);
    this.#finish(new Disconnected(reason || `the connection was lost (${code})`, { closeCode: code, final }));
  }

  /** @param {Disconnected} why */
  #finish(why) {
    if (this.ended) return;
    this.ended = why;
    this.#auth?.reject(why);
    for (const { reject } of [...this.#requests.values(), ...this.#pings.values()]) reject(why);
    this.#requests.clear();
    this.#pings.clear();
    this.#idle();
    this.#over.abort(why);
    this.#close(why);
    this.#client.ended(this, why);
  }

  /** Wait until every publish that was sent on it is answered, or until it has ended. @returns {Promise<void>} */
  async idle() {
    while (this.publishing.size && !this.ended) await new Promise((resolve) => (this.#idle = () => resolve(undefined)));
  }

  /** A publish was answered. @param {number} id */
  answered(id) {
    this.publishing.delete(id);
    if (!this.publishing.size) this.#idle();
  }

  /** @param {string} text @param {Stream | undefined} stream */
  #take(text, stream) {
    if (this.ended) return;
    this.heard = performance.now();
    try {
      (stream ? stream.splitter : this.#splitter).feed(text, (object) => this.#handle(object, stream));
    } catch (error) {
      // What follows cannot be understood any more.
      this.close(new Disconnected(`${error instanceof Error ? error.message : error}`), 4000);
    }
  }

  /** @param {any} object @param {Stream | undefined} stream */
  #handle(object, stream) {
    switch (object.type) {
      case 'message':
        return this.#client.deliver(this, object, stream);
      case 'auth_ok':
        return this.#auth?.resolve(object);
      case 'auth_error':
        return this.#auth?.reject(new Refused(object.code ?? 'unauthenticated', object.message, object.retry_after));
      case 'published':
        return this.#client.settled(this, object);
      case 'publish_error':
        return this.#client.settled(this, object);
      case 'pong':
        this.#pings.get(object.seq)?.resolve(object);
        this.#pings.delete(object.seq);
        return;
      case 'subscribed': {
        if (stream) stream.epoch = object.epoch;
        else this.epoch = object.epoch ?? this.epoch;
        const request = this.#requests.get(object.id);
        if (request?.feed) this.#client.joined(this, request.feed, object, stream);
        return this.#answer(object);
      }
      case 'unsubscribed':
        if (object.id === undefined) return this.#client.dropped(this, object.pattern);
        return this.#answer(object);
      case 'history':
        return this.#answer(object);
      case 'subscribe_error':
      case 'error':
        if (!this.#answer(object, new Refused(object.code ?? 'internal', object.message))) {
          this.#client.complain(new Refused(object.code ?? 'internal', object.message));
        }
        return;
      case 'live':
      case 'head':
      case 'gap':
      case 'revoked':
        if (object.epoch) {
          if (stream) stream.epoch = object.epoch;
          else this.epoch = object.epoch;
        }
        return this.#client.mark(this, object, stream);
      case 'goaway':
        return this.#client.sentAway(this, object);
      // What is not known is for those who know it (section 15).
    }
  }

  /** @param {any} object @param {Error} [error] @returns {boolean} whether somebody has waited for it */
  #answer(object, error) {
    const request = this.#requests.get(object.id);
    this.#requests.delete(object.id);
    if (error) request?.reject(error);
    else request?.resolve(object);
    return request !== undefined;
  }
}

/**
 * What a link hands on.
 *
 * @typedef {object} LinkOwner
 * @property {(link: Link, message: any, stream: Stream | undefined) => void} deliver
 * @property {(link: Link, mark: any, stream: Stream | undefined) => void} mark
 * @property {(link: Link, feed: Feed, answer: any, stream: Stream | undefined) => void} joined
 * @property {(link: Link, pattern: string) => void} dropped
 * @property {(link: Link, answer: any) => void} settled
 * @property {(link: Link, goaway: any) => void} sentAway
 * @property {(link: Link, why: Disconnected) => void} ended
 * @property {(error: Error) => void} complain
 */

/** A subscription, whatever connection it has at the moment. */
class Feed {
  /** Complete up to here, in `epoch`. @type {number | undefined} */
  cursor;
  /** @type {string | undefined} */
  epoch;
  /** Where it comes from: what other links say of it does not count. @type {Link | undefined} */
  link;
  /** Its own stream there. @type {Stream | undefined} */
  stream;
  /** Whether the broker has agreed to it once: from then on it is taken up again on each link. */
  started = false;
  /** Whether it wants nothing for now. */
  paused = false;
  /** Why it has ended. @type {Error | undefined} */
  failure;
  /** Told when it has. */
  onEnd = ignore;

  /** @param {string} pattern @param {(message: Message) => void} handler @param {SubscribeOptions} options */
  constructor(pattern, handler, options) {
    this.pattern = pattern;
    this.handler = handler;
    this.options = options;
    this.cursor = options.since;
    this.epoch = options.since === undefined ? undefined : options.epoch;
  }
}

/**
 * A message on its way into the log. It is kept until it is answered, and sent again on another connection (section 9.1).
 *
 * @typedef {object} Publish
 * @property {number} id
 * @property {string} body `"channel":...,"payload":...` and what else never changes
 * @property {boolean} sent
 * @property {number} after what was known when it was first sent
 * @property {string} epoch
 * @property {number} tries
 * @property {(answer: {seq: number, duplicate: boolean}) => void} resolve
 * @property {(error: Error) => void} reject
 */

/** Which transport has won, by URL, and until when that counts. @type {Map<string, {kind: string, until: number}>} */
const winners = new Map();

// The client

/** A client of a Catbus broker. `connect()` begins; what is asked for meanwhile waits. */
export class CatbusClient {
  #options;
  /** @type {ConnectionState} */
  #state = 'disconnected';
  /** @type {Map<string, Set<(value: any) => void>>} */
  #handlers = new Map();
  /** @type {Map<string, Feed>} */
  #feeds = new Map();
  /** @type {Link | undefined} */
  #link;
  /** Where publishes go: for a moment another one, while the client moves. @type {Link | undefined} */
  #publisher;
  /** @type {Map<number, Publish>} */
  #publishes = new Map();
  /** @type {Map<number, {link: Link, resolve: (answer: {}) => void, reject: (error: Error) => void}>} */
  #ephemeral = new Map();
  #ids = 0;
  #known = 0;
  /** @type {string | undefined} */
  #producer;
  /** The run that `connect` has begun and `disconnect` ends. @type {AbortController | undefined} */
  #run;
  #moving = false;
  /** Why it is not connected. @type {Error | undefined} */
  #last;
  /** @type {LinkOwner} */
  #owner;

  /** @param {Options} options */
  constructor(options) {
    const { url, fallbackUrl } = options;
    for (const each of [url, fallbackUrl]) if (each !== undefined) kindOf(each);
    if (fallbackUrl !== undefined && kindOf(fallbackUrl) !== 'websocket') {
      throw new TypeError('fallbackUrl is a WebSocket: it begins with ws:// or wss://');
    }
    this.#options = {
      autoReconnect: true,
      reconnectDelay: 1000,
      maxReconnectDelay: 30_000,
      reconnectJitter: 0.3,
      pingInterval: 30_000,
      pingTimeout: 10_000,
      offlineQueue: true,
      maxQueueSize: 100,
      connectTimeout: 10_000,
      headStart: 300,
      upgradeInterval: 60_000,
      ...options,
    };
    this.#owner = {
      deliver: (link, message, stream) => this.#deliver(link, message, stream),
      mark: (link, mark, stream) => this.#mark(link, mark, stream),
      joined: (link, feed, answer, stream) => this.#joined(link, feed, answer, stream),
      dropped: (link, pattern) => this.#dropped(link, pattern),
      settled: (link, answer) => this.#settled(link, answer),
      sentAway: (link, goaway) => this.#sentAway(link, goaway),
      ended: (link, why) => this.#forget(link, why),
      complain: (error) => this.#emit('error', error),
    };
  }

  // What it is

  /** @returns {ConnectionState} */
  get connectionState() {
    return this.#state;
  }

  /** Who the token says you are, while connected. @returns {string | null} */
  get id() {
    return this.#link?.clientId ?? null;
  }

  /** By what it is connected. @returns {'webtransport' | 'websocket' | null} */
  get transport() {
    return this.#link?.kind ?? null;
  }

  /**
   * Be told of something, again and again. Returns a function that ends it.
   *
   * @template {keyof Events} T
   * @param {T} type @param {(value: Events[T]) => void} handler @returns {() => void}
   */
  on(type, handler) {
    const handlers = this.#handlers.get(type) ?? new Set();
    this.#handlers.set(type, handlers.add(handler));
    return () => void handlers.delete(handler);
  }

  /** @param {(state: ConnectionState) => void} handler @returns {() => void} a function that ends it */
  onStateChange(handler) {
    return this.on('state', handler);
  }

  // Connecting

  /**
   * Connect, and stay connected until `disconnect`. Resolves when it is connected for the first time; rejects when the
   * broker says that coming back is no use, and with `autoReconnect: false` when the first try fails.
   *
   * @returns {Promise<void>}
   */
  connect() {
    if (this.#state === 'connected') return Promise.resolve();
    const connected = new Promise((resolve, reject) => {
      const stop = this.on('state', (state) => {
        if (state !== 'connected' && state !== 'disconnected') return;
        stop();
        if (state === 'connected') resolve(undefined);
        else reject(this.#last ?? new Disconnected('disconnected by this client'));
      });
    });
    if (!this.#run) {
      this.#run = new AbortController();
      this.#keepConnected(this.#run.signal);
    }
    return connected;
  }

  /** Leave. Subscriptions go on with the next `connect`, from where they are; what is not answered is rejected. */
  async disconnect() {
    this.#last = undefined;
    this.#stop(new Disconnected('disconnected by this client'));
  }

  /** @param {Error} why */
  #stop(why) {
    const run = this.#run;
    this.#run = undefined;
    run?.abort(why);
    this.#link?.close();
    this.#publisher?.close();
    this.#link = this.#publisher = undefined;
    for (const publish of this.#publishes.values()) {
      publish.reject(publish.sent ? new Refused('unknown', `${why.message}; it may have been published`) : why);
    }
    this.#publishes.clear();
    this.#setState('disconnected');
  }

  /** @param {AbortSignal} run */
  async #keepConnected(run) {
    const { autoReconnect } = this.#options;
    let tries = 0;
    let state = /** @type {ConnectionState} */ ('connecting');
    while (!run.aborted) {
      this.#setState(state);
      /** @type {Error} */
      let why;
      try {
        const link = await this.#dial(run);
        tries = 0;
        this.#adopt(link, run);
        why = await this.#wait(run);
      } catch (error) {
        why = error instanceof Error ? error : new Disconnected(`${error}`);
      }
      if (run.aborted) return;
      this.#last = why;
      this.#link = this.#publisher = undefined;
      if (!autoReconnect || isFinal(why, typeof this.#options.token === 'function')) {
        for (const feed of this.#feeds.values()) this.#end(feed, why);
        this.#stop(why);
        return;
      }
      this.#emit('error', why);
      state = 'reconnecting';
      this.#setState(state);
      let delay = this.#delay(tries++);
      if (why instanceof Refused && why.retryAfter !== undefined) {
        delay = Math.max(delay, Math.min(why.retryAfter * 1000, LONGEST_WAIT) + this.#delay(0));
      }
      await pause(delay, run, { untilOnline: true });
    }
  }

  /** Wait until the client has no link any more. @param {AbortSignal} run @returns {Promise<Error>} why */
  async #wait(run) {
    for (;;) {
      const link = /** @type {Link} */ (this.#link);
      const why = await link.closed;
      if (run.aborted || this.#link === link) return why;
      // It has moved to another one.
    }
  }

  /** @param {number} tries */
  #delay(tries) {
    const { reconnectDelay, maxReconnectDelay, reconnectJitter } = this.#options;
    const delay = Math.min(maxReconnectDelay, reconnectDelay * 2 ** tries);
    return delay * (1 + reconnectJitter * (2 * Math.random() - 1));
  }

  /**
   * Connect by whatever gets through: the winner of the last time first, or WebTransport; the other one starts a little
   * later, or when the first has failed. Who is first to authenticate stays.
   *
   * @param {AbortSignal} run @param {string[]} [kinds] only these
   * @returns {Promise<Link>}
   */
  async #dial(run, kinds) {
    const { url, fallbackUrl, headStart } = this.#options;
    let routes = [url, ...(fallbackUrl ? [fallbackUrl] : [])].filter((each) => !kinds || kinds.includes(kindOf(each)));
    routes = routes.filter((each) => this.#transportFor(kindOf(each))).flatMap(addressesOf);
    if (!routes.length) throw new Disconnected('there is neither WebTransport nor WebSocket here', { final: true });
    const winner = winners.get(url);
    if (winner && winner.until > Date.now()) routes.sort((a, b) => rank(a) - rank(b));
    /** @param {string} each */
    function rank(each) {
      return kindOf(each) === winner?.kind ? 0 : 1;
    }
    const link = await race(
      routes.map((route) => (/** @type {AbortSignal} */ signal) => this.#try(route, signal)),
      headStart,
      run,
    );
    winners.set(url, { kind: link.kind, until: Date.now() + MEMORY });
    return link;
  }

  /** One try. @param {string} url @param {AbortSignal} signal @returns {Promise<Link>} */
  async #try(url, signal) {
    const kind = kindOf(url);
    const limit = new AbortController();
    const timer = setTimeout(() => limit.abort(new Disconnected(`no answer from ${url}`)), this.#options.connectTimeout);
    const abort = () => limit.abort(signal.reason);
    signal.addEventListener('abort', abort, { once: true });
    /** @type {Link | undefined} */
    let link;
    try {
      const constructor = /** @type {any} */ (this.#transportFor(kind));
      const opening =
        kind === 'websocket'
          ? openWebSocket(url, constructor, limit.signal)
          : openWebTransport(url, constructor, await this.#hashes(url, limit.signal), limit.signal);
      const transport = await orAborted(opening, limit.signal, (late) => late.close(0, ''));
      link = new Link(transport, this.#owner);
      if (!this.#link) this.#setState('authenticating');
      const { token } = this.#options;
      const shown = typeof token === 'function' ? await orAborted(Promise.resolve(token()), limit.signal) : token;
      await orAborted(link.authenticate(shown, this.#producer), limit.signal);
      this.#refreshBefore(link, shown);
      return link;
    } catch (error) {
      link?.close();
      throw error;
    } finally {
      clearTimeout(timer);
      signal.removeEventListener('abort', abort);
    }
  }

  /** @param {string} kind */
  #transportFor(kind) {
    const { WebSocket, WebTransport } = this.#options;
    return kind === 'websocket' ? WebSocket ?? globalThis.WebSocket : WebTransport ?? globalThis.WebTransport;
  }

  /** The hash of a certificate that the broker has made for itself. @param {string} url @param {AbortSignal} signal */
  async #hashes(url, signal) {
    const { serverCertificateHashes, discovery, fallbackUrl } = this.#options;
    if (serverCertificateHashes) return serverCertificateHashes;
    if (!discovery && !isLoopback(new URL(url).hostname)) return undefined;
    const page = globalThis.location?.origin;
    const origins = [discovery, fallbackUrl?.replace(/^ws/, 'http'), page?.startsWith('http') ? page : undefined];
    for (const origin of origins.flatMap((each) => (each ? addressesOf(each) : []))) {
      try {
        const limit = AbortSignal.any([signal, AbortSignal.timeout(1000)]);
        const answer = await fetch(new URL('/.well-known/catbus', origin), { signal: limit, cache: 'no-store' });
        if (!answer.ok) continue;
        const found = await answer.json();
        if (!found.certificate_hash) return undefined;
        const value = Uint8Array.from(atob(found.certificate_hash), (character) => character.charCodeAt(0));
        return [{ algorithm: 'sha-256', value }];
      } catch {
        signal.throwIfAborted();
      }
    }
    return undefined;
  }

  /** The client has a link where there was none. @param {Link} link @param {AbortSignal} run */
  #adopt(link, run) {
    this.#link = link;
    this.#publishOn(link);
    this.#keepAlive(link);
    for (const feed of this.#feeds.values()) this.#takeUp(link, feed);
    this.#emit('transport', link.kind);
    this.#setState('connected');
    this.#upgradeLater(link, run);
  }

  /** Have a subscription fed by this link. @param {Link} link @param {Feed} feed */
  #takeUp(link, feed) {
    if (feed.started && !feed.paused) this.#join(link, feed).catch((error) => this.#lose(feed, error));
  }

  /** A subscription could not be taken up again. @param {Feed} feed @param {Error} error */
  #lose(feed, error) {
    if (error instanceof Disconnected || this.#feeds.get(feed.pattern) !== feed) return;
    if (error instanceof Refused && TRY_AGAIN.has(error.code)) {
      const link = this.#link;
      setTimeout(() => {
        if (link && link === this.#link && !link.ended) this.#takeUp(link, feed);
      }, RETRY_PAUSE);
      return;
    }
    this.#feeds.delete(feed.pattern);
    this.#end(feed, error);
    this.#emit('error', error);
    if (error instanceof Refused && error.code === 'unauthorized') {
      this.#emit('revoked', { pattern: feed.pattern, seq: feed.cursor ?? 0 });
    }
  }

  /** A subscription gets nothing more. @param {Feed} feed @param {Error} why */
  #end(feed, why) {
    feed.link = undefined;
    feed.failure = why;
    feed.onEnd();
  }

  /** Ping it now and then, and give it up when nothing is heard. @param {Link} link */
  async #keepAlive(link) {
    const { pingInterval, pingTimeout } = this.#options;
    while (!link.ended) {
      await pause(pingInterval, link.over);
      if (link.ended) return;
      const asked = performance.now();
      link.ping().catch(ignore);
      await pause(pingTimeout, link.over);
      if (!link.ended && link.heard < asked) link.close(new Disconnected('the broker does not answer'), 4000);
    }
  }

  /** Take a newer token before the present one has expired. @param {Link} link @param {string} token */
  async #refreshBefore(link, token) {
    const { token: source } = this.#options;
    const delay = untilRefresh(token, Date.now());
    if (typeof source !== 'function' || delay === undefined) return;
    await pause(delay, link.over);
    while (!link.ended) {
      try {
        const next = await source();
        await link.authenticate(next, undefined);
        return void this.#refreshBefore(link, next);
      } catch (error) {
        if (link.ended) return;
        this.#emit('error', error instanceof Error ? error : new Error(`${error}`));
        await pause(5000, link.over);
      }
    }
  }

  // Moving

  /** Try WebTransport again where it has not got through. @param {Link} link @param {AbortSignal} run */
  async #upgradeLater(link, run) {
    const { url, upgradeInterval } = this.#options;
    if (kindOf(url) !== 'webtransport' || link.kind === 'webtransport' || !this.#transportFor('webtransport')) return;
    while (!run.aborted && !link.ended && this.#link === link) {
      await pause(upgradeInterval, link.over);
      if (!run.aborted && !link.ended && this.#link === link) await this.#move(run, ['webtransport']);
    }
  }

  /** @param {Link} link @param {{reason: string, reconnect_in: number}} goaway */
  async #sentAway(link, { reason, reconnect_in: reconnectIn }) {
    const run = this.#run;
    this.#emit('goaway', { reason, reconnectIn });
    await pause(reconnectIn * 1000, link.over);
    if (run && !run.signal.aborted && this.#link === link && !link.ended) await this.#move(run.signal);
  }

  /**
   * Go over to another connection without losing or repeating anything: each subscription hears the old one until the new
   * one has agreed, and nothing new is published before everything on the old one is answered.
   *
   * @param {AbortSignal} run @param {string[]} [kinds]
   */
  async #move(run, kinds) {
    const old = this.#link;
    if (this.#moving || !old) return;
    this.#moving = true;
    /** @type {Link | undefined} */
    let next;
    try {
      next = await this.#dial(run, kinds);
      const link = next;
      const feeds = [...this.#feeds.values()].filter((feed) => feed.started && !feed.paused);
      await Promise.all(feeds.map((feed) => this.#join(link, feed)));
      if (run.aborted || this.#link !== old) return link.close();
      this.#link = link;
      this.#emit('transport', link.kind);
      this.#keepAlive(link);
      this.#upgradeLater(link, run);
      // Those that came meanwhile.
      for (const feed of this.#feeds.values()) if (feed.link !== link) this.#takeUp(link, feed);
      await old.idle();
      old.close();
      if (this.#link === link) this.#publishOn(link);
    } catch (error) {
      // That WebTransport does not get through, still, is nobody's error.
      if (!run.aborted && !kinds) this.#emit('error', error instanceof Error ? error : new Disconnected(`${error}`));
      next?.close();
      // Who has gone over already comes back.
      if (this.#link === old && !old.ended) {
        for (const feed of this.#feeds.values()) if (feed.link !== old) this.#takeUp(old, feed);
      }
    } finally {
      this.#moving = false;
    }
  }

  // Subscribing

  /**
   * Have `handler` called with every message that matches, from now on or after `since`, in the order of the log. Resolves
   * when the broker has agreed, and waits for a connection until then. Rejects with `Refused`.
   *
   * @param {string} pattern @param {(message: Message) => void} handler @param {SubscribeOptions} [options]
   * @returns {Promise<Subscription>}
   */
  async subscribe(pattern, handler, options = {}) {
    const feed = this.#add(pattern, handler, options);
    await this.#start(feed);
    return {
      pattern,
      get cursor() {
        return feed.cursor;
      },
      get epoch() {
        return feed.epoch;
      },
      unsubscribe: () => this.#shut(feed),
    };
  }

  /**
   * The messages that match, to be read by `for await`. What is not read waits: up to `buffer` messages here, and all the
   * others in the log, until there is room. Leaving the loop ends the subscription.
   *
   * @param {string} pattern @param {SubscribeOptions & {buffer?: number}} [options]
   * @returns {AsyncGenerator<Message, void, void>}
   */
  async *messages(pattern, { buffer = 1000, ...options } = {}) {
    /** @type {Message[]} */
    const waiting = [];
    let wake = ignore;
    /** @type {Feed} */
    let feed;
    const take = (/** @type {Message} */ message) => {
      waiting.push(message);
      if (waiting.length >= buffer) this.#rest(feed);
      wake();
    };
    feed = this.#add(pattern, take, options);
    try {
      await this.#start(feed);
      for (;;) {
        while (waiting.length) yield /** @type {Message} */ (waiting.shift());
        if (feed.paused) this.#goOn(feed);
        if (feed.failure) throw feed.failure;
        await new Promise((resolve) => {
          wake = feed.onEnd = () => resolve(undefined);
        });
      }
    } finally {
      await this.#shut(feed);
    }
  }

  /** @param {string} pattern @param {(message: Message) => void} handler @param {SubscribeOptions} options */
  #add(pattern, handler, options) {
    if (this.#feeds.has(pattern)) throw new CatbusError('limit', `there is a subscription for ${pattern} already`);
    const feed = new Feed(pattern, handler, options);
    this.#feeds.set(pattern, feed);
    return feed;
  }

  /** @param {Feed} feed */
  async #start(feed) {
    while (this.#feeds.get(feed.pattern) === feed) {
      const link = this.#link;
      if (!link || link.ended) {
        if (!this.#run) throw this.#drop(feed, new Disconnected('not connected: call connect() first'));
        await new Promise((resolve) => {
          const stop = this.on('state', () => {
            stop();
            resolve(undefined);
          });
        });
        continue;
      }
      try {
        await this.#join(link, feed);
        feed.started = true;
        return;
      } catch (error) {
        if (!(error instanceof Disconnected)) throw this.#drop(feed, error);
      }
    }
  }

  /** @template T @param {Feed} feed @param {T} error @returns {T} */
  #drop(feed, error) {
    if (this.#feeds.get(feed.pattern) === feed) this.#feeds.delete(feed.pattern);
    return error;
  }

  /** @param {Link} link @param {Feed} feed */
  #join(link, feed) {
    const { cursor: since, epoch, options } = feed;
    return link.request(
      {
        type: 'subscribe',
        pattern: feed.pattern,
        ...(since !== undefined && { since, epoch }),
        ...(options.stream && { stream: true }),
        ...(options.datagrams && { datagrams: true }),
      },
      feed,
    );
  }

  /** The broker has agreed: from here on this link feeds it. @type {LinkOwner['joined']} */
  #joined(link, feed, answer, stream) {
    if (this.#feeds.get(feed.pattern) !== feed || feed.paused) return;
    feed.link = link;
    feed.stream = stream;
    if (stream) stream.feed = feed;
    if (feed.cursor === undefined) {
      feed.cursor = answer.seq;
      feed.epoch = answer.epoch;
    }
  }

  /**
   * The broker has ended a subscription whose own stream was not read for too long (a page may be frozen): it goes on
   * from its cursor.
   *
   * @type {LinkOwner['dropped']}
   */
  #dropped(link, pattern) {
    const feed = this.#feeds.get(pattern);
    if (!feed || feed.link !== link || feed.paused) return;
    feed.link = feed.stream = undefined;
    this.#takeUp(link, feed);
  }

  /** @param {Feed} feed */
  async #shut(feed) {
    if (this.#feeds.get(feed.pattern) !== feed) return;
    this.#feeds.delete(feed.pattern);
    const link = feed.link;
    feed.link = undefined;
    try {
      if (link && !link.ended) await link.request({ type: 'unsubscribe', pattern: feed.pattern });
    } catch {
      // It has ended with the connection.
    }
  }

  /** Want nothing for now: the log keeps it. @param {Feed} feed */
  #rest(feed) {
    if (feed.paused) return;
    feed.paused = true;
    const link = feed.link;
    feed.link = undefined;
    link?.request({ type: 'unsubscribe', pattern: feed.pattern }).catch(ignore);
  }

  /** @param {Feed} feed */
  #goOn(feed) {
    feed.paused = false;
    if (this.#link && !this.#link.ended) this.#takeUp(this.#link, feed);
  }

  /** @type {LinkOwner['deliver']} */
  #deliver(link, message, stream) {
    const { channel, payload, pattern, seq, at, sender } = message;
    const feed = stream ? stream.feed : this.#feeds.get(pattern);
    if (!feed || feed.link !== link || (seq !== undefined && feed.stream !== stream)) return;
    if (seq !== undefined) {
      // While it moves, and after, the new connection repeats what the old one has brought.
      if (feed.cursor !== undefined && seq <= feed.cursor) return;
      feed.cursor = seq;
      feed.epoch = stream?.epoch ?? link.epoch;
      this.#know(seq);
    }
    this.#call(feed.handler, { channel, payload, pattern, seq, at, sender });
  }

  /** @type {LinkOwner['mark']} */
  #mark(link, mark, stream) {
    if (mark.type === 'head') {
      this.#know(mark.seq);
      const feeds = stream ? [stream.feed] : this.#feeds.values();
      for (const feed of feeds) {
        if (!feed || feed.link !== link || feed.stream !== stream) continue;
        feed.cursor = mark.seq;
        feed.epoch = mark.epoch;
      }
      return;
    }
    const feed = stream ? stream.feed : this.#feeds.get(mark.pattern);
    if (!feed || feed.link !== link) return;
    if (mark.type === 'live') {
      feed.cursor = mark.seq;
      feed.epoch = stream?.epoch ?? link.epoch;
    } else if (mark.type === 'gap') {
      feed.cursor = mark.to;
      feed.epoch = mark.epoch;
      const { pattern, from, to, epoch, reason } = mark;
      const gap = { pattern, from, to, epoch, reason };
      if (feed.options.onGap) this.#call(feed.options.onGap, gap);
      this.#emit('gap', gap);
    } else {
      this.#feeds.delete(feed.pattern);
      this.#end(feed, new Refused('revoked', 'the permission was withdrawn'));
      this.#emit('revoked', { pattern: mark.pattern, seq: mark.seq });
    }
  }

  // Publishing

  /**
   * Publish JSON. Resolves when it is committed, with its place in the log; an ephemeral one, when it was passed on. What
   * has no answer when the connection is lost is sent again on the next one, and appears once. Rejects with `Refused`:
   * after `unknown` it may have been published, after any other code it was not.
   *
   * @param {string} channel @param {any} payload
   * @param {{ephemeral?: boolean, echo?: boolean}} [options] `echo: false`: not back to this client
   * @returns {Promise<{seq?: number, duplicate?: boolean}>}
   */
  async publish(channel, payload, { ephemeral = false, echo = true } = {}) {
    const json = JSON.stringify(payload);
    if (json === undefined) throw new TypeError('this payload has no JSON form');
    const body = `"channel":${JSON.stringify(channel)},"payload":${json}${echo ? '' : ',"echo":false'}`;
    // The broker would not say which message it has not understood.
    if (body.includes('\\ud') && HALF_A_PAIR.test(body)) throw new Refused('bad_message', 'half of a surrogate pair is no text');
    if (depthOf(json) >= MAX_DEPTH) throw new Refused('bad_message', `nested deeper than ${MAX_DEPTH}`);
    const limit = this.#link?.limits.message_size ?? 65_536;
    // A little is left for what is added. Over the limit the broker would close the connection.
    if (body.length * 3 > limit - 256 && encoder.encode(body).length > limit - 256) {
      throw new Refused('too_large', `a message may have at most ${limit} bytes`);
    }
    if (ephemeral) return this.#publishEphemeral(body);
    const { offlineQueue, maxQueueSize } = this.#options;
    if (!this.#link || this.#link.ended) {
      if (!offlineQueue || !this.#run) throw new Disconnected('not connected');
      const queued = [...this.#publishes.values()].filter((publish) => !publish.sent).length;
      if (queued >= maxQueueSize) throw new CatbusError('overloaded', `${queued} messages wait for a connection already`);
    }
    return new Promise((resolve, reject) => {
      const id = ++this.#ids;
      this.#publishes.set(id, { id, body, sent: false, after: 0, epoch: '', tries: 0, resolve, reject });
      this.#pump();
    });
  }

  /** @param {string} body @returns {Promise<{}>} */
  #publishEphemeral(body) {
    const link = this.#publisher;
    if (!link || link.ended) return Promise.reject(new Disconnected('not connected'));
    return new Promise((resolve, reject) => {
      const id = ++this.#ids;
      this.#ephemeral.set(id, { link, resolve, reject });
      link.sendText(`{"type":"publish","id":${id},"ephemeral":true,${body}}`);
    });
  }

  /** What was passed on by a link that has ended has no answer any more. @type {LinkOwner['ended']} */
  #forget(link, why) {
    for (const [id, ephemeral] of this.#ephemeral) {
      if (ephemeral.link === link && this.#ephemeral.delete(id)) ephemeral.reject(why);
    }
  }

  /** From now on this link is published on: first, again, what has no answer yet. @param {Link} link */
  #publishOn(link) {
    const same = this.#producer === undefined || this.#producer === link.producer;
    this.#producer = link.producer;
    this.#publisher = link;
    for (const publish of [...this.#publishes.values()]) {
      if (!publish.sent) continue;
      const knowable = same && publish.epoch === link.epoch && publish.after >= link.floor - 1;
      if (knowable) link.retrying.add(publish.id);
      else this.#settle(publish, new Refused('unknown', 'nobody can say any more whether this was published'));
    }
    for (const id of link.retrying) this.#send(link, /** @type {Publish} */ (this.#publishes.get(id)));
    this.#pump();
  }

  /** Send what waits, unless something has to be answered before. */
  #pump() {
    const link = this.#publisher;
    // While the client moves, what is new waits until all on the old link is answered.
    if (!link || link.ended || link !== this.#link || link.retrying.size) return;
    const most = link.limits.pending_publishes ?? 1000;
    for (const publish of this.#publishes.values()) {
      if (link.publishing.size >= most) return;
      if (!publish.sent) this.#send(link, publish);
    }
  }

  /** @param {Link} link @param {Publish} publish */
  #send(link, publish) {
    link.publishing.add(publish.id);
    if (!publish.sent) {
      publish.sent = true;
      publish.after = Math.max(this.#known, link.head);
      publish.epoch = link.epoch;
      link.sendText(`{"type":"publish","id":${publish.id},${publish.body}}`);
    } else {
      const { id, after, epoch, body } = publish;
      link.sendText(`{"type":"publish","id":${id},"retry":true,"after":${after},"epoch":${JSON.stringify(epoch)},${body}}`);
    }
  }

  /** @type {LinkOwner['settled']} */
  #settled(link, answer) {
    const ephemeral = this.#ephemeral.get(answer.id);
    if (ephemeral) {
      this.#ephemeral.delete(answer.id);
      if (answer.type === 'published') ephemeral.resolve({});
      else ephemeral.reject(new Refused(answer.code ?? 'internal', answer.message, answer.retry_after));
      return;
    }
    const publish = this.#publishes.get(answer.id);
    link.answered(answer.id);
    if (!publish) return;
    const again = link.retrying.has(answer.id) || publish.tries > 0;
    if (answer.type === 'published') {
      this.#know(answer.seq);
      link.retrying.delete(answer.id);
      this.#settle(publish, undefined, { seq: answer.seq, duplicate: answer.duplicate === true });
    } else {
      this.#refused(link, publish, answer, again);
    }
    if (!link.retrying.size) this.#pump();
  }

  /** @param {Link} link @param {Publish} publish @param {any} answer @param {boolean} again whether it was sent before */
  #refused(link, publish, answer, again) {
    const code = answer.code ?? 'internal';
    const hopeless = publish.epoch !== link.epoch || publish.after < link.floor - 1;
    if (again && code === 'shutting_down') return; // Another replica will know.
    if (!hopeless && (again ? TRY_AGAIN.has(code) : code === 'unknown')) {
      // Those behind it wait, or they would overtake it.
      link.retrying.add(publish.id);
      publish.tries++;
      setTimeout(() => {
        if (!link.ended && this.#publisher === link && this.#publishes.has(publish.id)) this.#send(link, publish);
      }, RETRY_PAUSE * Math.min(publish.tries, 10));
      return;
    }
    link.retrying.delete(publish.id);
    this.#settle(publish, new Refused(again ? 'unknown' : code, answer.message, answer.retry_after));
  }

  /** @param {Publish} publish @param {Error | undefined} error @param {{seq: number, duplicate: boolean}} [answer] */
  #settle(publish, error, answer) {
    this.#publishes.delete(publish.id);
    if (answer) publish.resolve(answer);
    else publish.reject(/** @type {Error} */ (error));
  }

  /** @param {number} seq */
  #know(seq) {
    if (seq > this.#known) this.#known = seq;
  }

  // Asking

  /**
   * Messages of the past, oldest first: the newest `limit` of those below `before`.
   *
   * @param {string} pattern @param {{limit?: number, before?: number}} [options]
   * @returns {Promise<{messages: Message[], more: boolean}>} `more`: whether there are older ones
   */
  async history(pattern, { limit, before } = {}) {
    // What it is not an answer to, the broker would not say.
    for (const [name, value, least] of /** @type {const} */ ([['limit', limit, 1], ['before', before, 0]])) {
      if (value !== undefined && !(Number.isSafeInteger(value) && value >= least)) {
        throw new TypeError(`${name} is an integer from ${least}`);
      }
    }
    const { messages, more } = await this.#connected().request({ type: 'history', pattern, limit, before });
    return { messages: messages.map(asMessage), more };
  }

  /** How long it takes to the broker and back. @returns {Promise<number>} milliseconds */
  async ping() {
    return this.#connected().ping();
  }

  #connected() {
    if (!this.#link || this.#link.ended) throw new Disconnected('not connected');
    return this.#link;
  }

  // Telling

  /** @param {ConnectionState} state */
  #setState(state) {
    if (state === this.#state) return;
    this.#state = state;
    this.#emit('state', state);
  }

  /** @template {keyof Events} T @param {T} type @param {Events[T]} value */
  #emit(type, value) {
    for (const handler of [...(this.#handlers.get(type) ?? [])]) this.#call(handler, value);
  }

  /** An error in a handler is its owner's, and stops nobody else. @template T @param {(value: T) => void} handler @param {T} value */
  #call(handler, value) {
    try {
      handler(value);
    } catch (error) {
      if (globalThis.reportError) globalThis.reportError(error);
      else console.error(error);
    }
  }
}

// Odds and ends

/** @param {any} message @returns {Message} */
function asMessage({ channel, payload, pattern, seq, at, sender }) {
  return { channel, payload, pattern, seq, at, sender };
}

/** @param {string} url @returns {'webtransport' | 'websocket'} */
function kindOf(url) {
  switch (new URL(url).protocol) {
    case 'https:':
      return 'webtransport';
    case 'ws:':
    case 'wss:':
      return 'websocket';
    default:
      throw new TypeError(`the URL of a broker begins with https://, ws:// or wss://, not ${url}`);
  }
}

/** @param {string} host */
function isLoopback(host) {
  return host === 'localhost' || host.endsWith('.localhost') || host === '[::1]' || /^127(\.\d+){3}$/.test(host);
}

/**
 * A URL, and where it means this machine by name, also with both of its addresses: the system may know one of them, or a
 * browser try one of them, and the broker listen on the other.
 *
 * @param {string} url @returns {string[]}
 */
function addressesOf(url) {
  const { hostname } = new URL(url);
  if (hostname !== 'localhost' && !hostname.endsWith('.localhost')) return [url];
  return [url, ...['127.0.0.1', '[::1]'].map((address) => Object.assign(new URL(url), { hostname: address }).href)];
}

/** How deep the arrays and objects of a JSON text are nested, at the most. @param {string} json */
function depthOf(json) {
  // With so few brackets it cannot be deep, and most have few.
  const brackets = json.match(/[[{]/g)?.length ?? 0;
  if (brackets < MAX_DEPTH) return brackets;
  let deepest = 0;
  let depth = 0;
  for (const [token] of json.matchAll(/"(?:[^"\\]|\\.)*"|[[\]{}]/g)) {
    if (token === '[' || token === '{') deepest = Math.max(deepest, ++depth);
    else if (token === ']' || token === '}') depth--;
  }
  return deepest;
}

/** Whether coming back would be no better. @param {Error} why @param {boolean} renewable whether there are new tokens */
function isFinal(why, renewable) {
  if (why instanceof Disconnected) {
    const { closeCode: code = 0 } = why;
    return why.final || (!renewable && code >= 4400 && code < 4500);
  }
  return why instanceof Refused && FINAL.has(why.code) && !(renewable && why.code === 'token_expired');
}

/** When a token expires, in milliseconds since 1970, where it says so. @param {string} token @returns {number | undefined} */
export function expiryOf(token) {
  return momentIn(token, 'exp');
}

/**
 * How many milliseconds the next token can wait, where this one expires. `now` is in milliseconds since 1970.
 *
 * The broker has just taken the token. Where the time that is left is less than nothing, or more than the token was made
 * for, the clock of this device is wrong, and the token counts as just made.
 *
 * @param {string} token @param {number} now @returns {number | undefined}
 */
export function untilRefresh(token, now) {
  const expires = momentIn(token, 'exp');
  if (expires === undefined) return undefined;
  let left = expires - now;
  const life = expires - (momentIn(token, 'iat') ?? Infinity);
  if (life > 0 && !(left > 0 && left <= life)) left = life;
  else if (left < -2 * REFRESH_BEFORE) return REFRESH_BEFORE;
  return Math.max(SHORTEST_REFRESH, left / 2, left - REFRESH_BEFORE);
}

/** @param {string} token @param {string} claim @returns {number | undefined} milliseconds since 1970 */
function momentIn(token, claim) {
  const part = token.startsWith('sub-') ? token.slice(4).split('.')[0] : token.split('.')[1];
  try {
    const bytes = Uint8Array.from(atob(part.replace(/-/g, '+').replace(/_/g, '/')), (c) => c.charCodeAt(0));
    const value = JSON.parse(new TextDecoder().decode(bytes))[claim];
    return typeof value === 'number' ? value * 1000 : undefined;
  } catch {
    return undefined;
  }
}

/**
 * Try one way, and after `headStart` milliseconds, or when it has failed, the next one beside it. The first to succeed
 * wins, and the others are given up. A refusal counts for all.
 *
 * @template T
 * @param {((signal: AbortSignal) => Promise<T>)[]} ways @param {number} headStart @param {AbortSignal} run
 * @returns {Promise<T>}
 */
export function race(ways, headStart, run) {
  return new Promise((resolve, reject) => {
    const over = new AbortController();
    const stop = () => finish(() => reject(run.reason));
    let begun = 0;
    let failed = 0;
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    let timer;
    /** @param {() => void} done */
    function finish(done) {
      clearTimeout(timer);
      run.removeEventListener('abort', stop);
      over.abort(new Disconnected('another way was faster'));
      done();
    }
    function begin() {
      clearTimeout(timer);
      if (begun === ways.length || over.signal.aborted) return;
      ways[begun++](over.signal).then(
        (value) => finish(() => resolve(value)),
        (error) => {
          if (over.signal.aborted) return;
          if (error instanceof Refused || ++failed === ways.length) finish(() => reject(error));
          else begin();
        },
      );
      timer = setTimeout(begin, headStart);
    }
    if (run.aborted) return reject(run.reason);
    run.addEventListener('abort', stop);
    begin();
  });
}

/**
 * @template T @param {Promise<T>} work @param {AbortSignal} signal @param {(late: T) => void} [discard] what comes too late
 * @returns {Promise<T>}
 */
function orAborted(work, signal, discard) {
  return new Promise((resolve, reject) => {
    const abort = () => {
      reject(signal.reason);
      if (discard) work.then(discard, ignore);
    };
    if (signal.aborted) {
      work.catch(ignore);
      return abort();
    }
    signal.addEventListener('abort', abort, { once: true });
    work.then(resolve, reject).finally(() => signal.removeEventListener('abort', abort));
  });
}

/**
 * Wait so many milliseconds, or until the signal.
 *
 * @param {number} ms @param {AbortSignal} signal @param {{untilOnline?: boolean}} [more] or until there is a network again
 * @returns {Promise<void>}
 */
function pause(ms, signal, { untilOnline = false } = {}) {
  return new Promise((resolve) => {
    const wake = () => {
      clearTimeout(timer);
      signal.removeEventListener('abort', wake);
      if (untilOnline) globalThis.removeEventListener?.('online', wake);
      resolve();
    };
    const timer = setTimeout(wake, Math.min(Math.max(0, ms), FOREVER));
    if (signal.aborted) return wake();
    signal.addEventListener('abort', wake);
    if (untilOnline) globalThis.addEventListener?.('online', wake);
  });
}
