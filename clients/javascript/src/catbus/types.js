/**
 * The types of the public calls. They name nothing of the DOM, so they compile where there is none.
 *
 * @module
 */

/**
 * How a client is connected.
 *
 * @typedef {import('./connection_states.js').ConnectionState} ConnectionState
 */

/**
 * A signal to stop, as `AbortController` gives it.
 *
 * @typedef {object} AbortSignalLike
 * @property {boolean} aborted Whether it has been given.
 * @property {any} [reason] Why.
 * @property {(type: 'abort', listener: () => void) => void} addEventListener Be told when it is given.
 * @property {(type: 'abort', listener: () => void) => void} removeEventListener Be told no more.
 */

/**
 * Where a cursor is kept over a reload, as `localStorage` is.
 *
 * @typedef {object} StorageLike
 * @property {(key: string) => string | null} getItem What is kept under a key.
 * @property {(key: string, value: string) => void} setItem Keep something.
 */

/**
 * A WebSocket, as browsers and the package `ws` have it.
 *
 * @typedef {object} WebSocketLike
 * @property {(data: string) => void} send Send a text.
 * @property {(code?: number, reason?: string) => void} close Close it.
 * @property {((event: any) => any) | null} onopen Called when it is open.
 * @property {((event: any) => any) | null} onmessage Called for each message.
 * @property {((event: any) => any) | null} onclose Called when it has closed.
 * @property {((event: any) => any) | null} onerror Called when it has failed.
 */

/**
 * How a client is made.
 *
 * @typedef {object} Options
 * @property {string} url Where the broker is: `https://` for WebTransport, `ws://` or `wss://` for WebSocket.
 * @property {string | undefined} [fallbackUrl] A WebSocket (`ws://`, `wss://`) for where no UDP gets through.
 * @property {string | (() => string | Promise<string>)} token Who you are. A function is asked for a new one whenever one
 *   is needed, and some time before the present one expires. When it throws a `RefusedError` the client ends for good;
 *   after any other error it is asked again later.
 * @property {boolean} [autoReconnect] Whether a lost connection is made again: true unless said otherwise.
 * @property {number} [reconnectDelay] Milliseconds before the first try to reconnect: 1000. It doubles with each try.
 * @property {number} [maxReconnectDelay] Milliseconds at most: 30000.
 * @property {number} [reconnectJitter] By which part of it a delay varies at random: 0.3.
 * @property {number} [pingInterval] Milliseconds between pings: 30000.
 * @property {number} [pingTimeout] Milliseconds without any answer to a ping until the connection counts as lost: 10000.
 * @property {boolean} [offlineQueue] Whether a message that is published without a connection waits for one: true unless
 *   said otherwise.
 * @property {number} [maxQueueSize] How many messages may wait for a connection: 100.
 * @property {number} [connectTimeout] Milliseconds for one try to connect and to authenticate: 10000.
 * @property {number} [headStart] Milliseconds for which WebTransport is tried alone: 300.
 * @property {number} [upgradeInterval] Milliseconds after which a session over the fallback tries WebTransport again:
 *   60000.
 * @property {boolean} [bigint] Whether integers beyond 2^53 in payloads come as `bigint`, with all of their digits. A
 *   `bigint` can be published either way. False unless said otherwise: they come as numbers, and are not exact.
 * @property {string | undefined} [discovery] The HTTP origin of a broker with a certificate of its own making, whose hash
 *   is asked for there. Found by itself where `url` is on this machine.
 * @property {{algorithm: string, value: ArrayBuffer | ArrayBufferView}[] | undefined} [serverCertificateHashes] As
 *   WebTransport takes them; nothing is asked for then.
 * @property {StorageLike | undefined} [storage] Where `persist` keeps cursors: `localStorage` unless said otherwise.
 * @property {(new (url: string) => WebSocketLike) | undefined} [WebSocket] A constructor, where there is no global one
 *   (Node before 22).
 * @property {(new (url: string, options?: any) => any) | undefined} [WebTransport] The same.
 */

/**
 * A message.
 *
 * @template [T=any]
 * @typedef {object} Message
 * @property {string} channel Where it was published.
 * @property {T} payload What was published.
 * @property {string} pattern The subscription's pattern that it came for.
 * @property {number | undefined} seq Its place in the log; an ephemeral one has none.
 * @property {number | undefined} at When it was committed, in milliseconds since 1970, by the log's clock.
 * @property {string | undefined} sender The publisher's `client_id`, where it has one.
 * @property {string | undefined} cursor The place after it, as opaque text: `since` takes it. An ephemeral one has none.
 */

/**
 * What may be missing from a subscription.
 *
 * @typedef {object} Gap
 * @property {string} pattern The subscription's pattern.
 * @property {number} from The first seq that may be missing.
 * @property {number} to The last.
 * @property {string} epoch The epoch of the log that follows.
 * @property {string} reason `retention`: it was deleted; `epoch`: the log is another one; `repair`: it was deleted by hand.
 */

/**
 * Where a subscription starts, and whom it tells of what happens to it. Without `since`, `last` and `persist` it starts
 * with what comes from now on.
 *
 * @typedef {object} SubscribeOptions
 * @property {number | string | undefined} [since] First everything after this, then what is new: the cursor of a message
 *   or a page, or a seq.
 * @property {string | undefined} [epoch] The epoch of `since`, where that is a seq.
 * @property {number | undefined} [last] First so many messages of the past, then what is new, without a gap between.
 * @property {string | undefined} [persist] A name under which the cursor is kept over a reload: the subscription then
 *   starts where it was, and the first time as the other options say.
 * @property {AbortSignalLike | undefined} [signal] Ends the subscription, as `close()` does.
 * @property {((gap: Gap) => void) | undefined} [onGap] Told of what may be missing, before anything that comes after it.
 * @property {(() => void) | undefined} [onLive] Told when it has caught up, and what comes is new: at first, and whenever
 *   it was behind.
 * @property {((error: Error) => void) | undefined} [onEnd] Told once when it has ended in another way than by `close()` or
 *   `signal`, and why. Nothing comes after that.
 * @property {boolean | undefined} [stream] WebTransport: a stream of its own, so that no other subscription holds it up.
 * @property {boolean | undefined} [datagrams] WebTransport: ephemeral messages as datagrams.
 */

/**
 * A subscription.
 *
 * @typedef {object} Subscription
 * @property {string} pattern The pattern.
 * @property {number | undefined} cursor The seq up to which everything was handled.
 * @property {string | undefined} epoch The epoch of that seq.
 * @property {string | undefined} position Both, as opaque text: `since` for another time.
 * @property {() => Promise<void>} close End it. Nothing is handled after that; resolves when the broker knows.
 * @property {() => Promise<void>} unsubscribe The same.
 */

/**
 * A subscription from the moment it is asked for. Awaiting it, or `ready`, waits until the broker has agreed.
 *
 * @typedef {Subscription & PromiseLike<Subscription> & {
 *   ready: Promise<Subscription>,
 *   catch: Promise<Subscription>['catch'],
 *   finally: Promise<Subscription>['finally'],
 * }} SubscriptionHandle
 */

/**
 * Messages of the past.
 *
 * @template [T=any]
 * @typedef {object} Page
 * @property {Message<T>[]} messages Oldest first.
 * @property {boolean} more Whether there are older ones that were asked for.
 * @property {string | undefined} cursor The place after the newest of them, or where the log was if there are none:
 *   `since` goes on from there.
 */

/**
 * Which messages of the past.
 *
 * @typedef {object} HistoryOptions
 * @property {number | string | undefined} [after] Only messages after this cursor, or seq.
 * @property {number | string | undefined} [before] Only messages before the one with this cursor, or seq.
 * @property {number | undefined} [limit] How many at most, the newest of them: 100 unless said otherwise, and as many as
 *   the broker allows.
 */

/**
 * What became of a publish. An ephemeral one has neither.
 *
 * @typedef {object} Published
 * @property {number} [seq] Its place in the log.
 * @property {boolean} [duplicate] Whether an earlier try had put it there already.
 */

/**
 * What a client tells of, by name.
 *
 * @typedef {object} Events
 * @property {ConnectionState} state The state is another one.
 * @property {'webtransport' | 'websocket'} transport Connected, by this.
 * @property {Gap} gap What may be missing from a subscription.
 * @property {{pattern: string, seq: number}} revoked The permission for a subscription was withdrawn; it has ended.
 * @property {{reason: string, reconnectIn: number}} goaway The replica is about to stop: the client moves by itself.
 * @property {Error} error Something went wrong that nobody waits for: a try to connect, a subscription that came to an end,
 *   a handler that was rejected.
 */

export {};
