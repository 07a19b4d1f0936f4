/**
 * The types of the public calls. They name nothing of the DOM, so they compile where there is none.
 *
 * @module
 */

/**
 * The state of a client.
 *
 * @typedef {import('./connection_states.js').ConnectionState} ConnectionState
 */

/**
 * An abort signal, as `AbortController` has it.
 *
 * @typedef {object} AbortSignalLike
 * @property {boolean} aborted Whether it was aborted.
 * @property {any} [reason] The reason.
 * @property {(type: 'abort', listener: () => void) => void} addEventListener Add a listener.
 * @property {(type: 'abort', listener: () => void) => void} removeEventListener Remove a listener.
 */

/**
 * Storage for cursors that survives a reload, such as `localStorage`.
 *
 * @typedef {object} StorageLike
 * @property {(key: string) => string | null} getItem Read a value.
 * @property {(key: string, value: string) => void} setItem Store a value.
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
 * The options of a client.
 *
 * @typedef {object} Options
 * @property {string} url The URL of the broker: `https://` for WebTransport, `ws://` or `wss://` for WebSocket.
 * @property {string | undefined} [fallbackUrl] A WebSocket (`ws://`, `wss://`) for networks that block UDP.
 * @property {string | (() => string | Promise<string>)} token The token. A function is called for each connection, and
 *   before the present token expires. If it throws a `RefusedError` the client ends; after any other error it is called
 *   again later.
 * @property {boolean} [autoReconnect] Whether to reconnect: default true.
 * @property {number} [reconnectDelay] Milliseconds before the first attempt to reconnect: 1000. It doubles with each attempt.
 * @property {number} [maxReconnectDelay] Milliseconds at most: 30000.
 * @property {number} [reconnectJitter] The fraction by which a delay varies at random: 0.3.
 * @property {number} [pingInterval] Milliseconds between pings: 30000.
 * @property {number} [pingTimeout] Milliseconds without a reply to a ping until the connection counts as lost: 10000.
 * @property {boolean} [offlineQueue] Whether a message that is published without a connection waits for one: default
 *   true.
 * @property {number} [maxQueueSize] How many messages may wait for a connection: 100.
 * @property {number} [connectTimeout] Milliseconds for one attempt to connect and authenticate: 10000.
 * @property {number} [headStart] Milliseconds for which WebTransport is tried alone: 300.
 * @property {number} [upgradeInterval] Milliseconds after which a session over the fallback tries WebTransport again:
 *   60000.
 * @property {boolean} [bigint] Whether integers beyond 2^53 in payloads come as `bigint`, with all of their digits. A
 *   `bigint` can be published either way. Default false: they come as numbers, and are not exact.
 * @property {string | undefined} [discovery] The HTTP origin of a broker with a self-signed certificate, whose hash is
 *   fetched there. Not needed if `url` is on this machine.
 * @property {{algorithm: string, value: ArrayBuffer | ArrayBufferView}[] | undefined} [serverCertificateHashes] As
 *   WebTransport takes them; no hash is fetched then.
 * @property {StorageLike | undefined} [storage] Where `persist` keeps cursors: default `localStorage`.
 * @property {(new (url: string) => WebSocketLike) | undefined} [WebSocket] A constructor, if there is no global one
 *   (Node before 22).
 * @property {(new (url: string, options?: any) => any) | undefined} [WebTransport] The same.
 */

/**
 * A message.
 *
 * @template [T=any]
 * @typedef {object} Message
 * @property {string} channel Its channel.
 * @property {T} payload Its payload.
 * @property {string} pattern The pattern of the subscription.
 * @property {number | undefined} seq Its seq in the log. An ephemeral message has none.
 * @property {number | undefined} at When it was committed, in milliseconds since 1970, by the log's clock.
 * @property {string | undefined} sender The `client_id` of the publisher, if it has one.
 * @property {string | undefined} cursor The position after it, as opaque text for `since`. An ephemeral message has none.
 * @property {true | undefined} [retain] Whether it became the retained message of its channel, or removed that.
 */

/**
 * Messages that may be missing from a subscription.
 *
 * @typedef {object} Gap
 * @property {string} pattern The subscription's pattern.
 * @property {number} from The first seq that may be missing.
 * @property {number} to The last.
 * @property {string} epoch The epoch of the log that follows.
 * @property {string} reason `retention`: they were deleted; `epoch`: the log has another epoch; `repair`: they were deleted by hand.
 */

/**
 * The start of a subscription, and its callbacks. Without `since`, `last` and `persist` it starts with new messages.
 *
 * @typedef {object} SubscribeOptions
 * @property {number | string | undefined} [since] Start after this position: the cursor of a message or a page, or a
 *   seq.
 * @property {string | undefined} [epoch] The epoch of `since`, if that is a seq.
 * @property {number | undefined} [last] Start with the newest so many messages of the log, then new ones, without a gap.
 * @property {string | undefined} [persist] A name under which the cursor is kept over a reload: the subscription
 *   resumes there, and starts the first time as the other options say.
 * @property {AbortSignalLike | undefined} [signal] Ends the subscription, as `close()` does.
 * @property {((gap: Gap) => void) | undefined} [onGap] Called with messages that may be missing, before later messages.
 * @property {(() => void) | undefined} [onLive] Called when it has caught up: at first, and whenever it lagged.
 * @property {((error: Error) => void) | undefined} [onEnd] Called once if it ends other than by `close()` or `signal`, with
 *   the reason. Nothing comes after that.
 * @property {boolean | undefined} [stream] WebTransport: a stream of its own, so that no other subscription delays it.
 * @property {boolean | undefined} [datagrams] WebTransport: ephemeral messages as datagrams.
 */

/**
 * A subscription.
 *
 * @typedef {object} Subscription
 * @property {string} pattern The pattern.
 * @property {number | undefined} cursor The seq up to which everything was handled.
 * @property {string | undefined} epoch The epoch of that seq.
 * @property {string | undefined} position Both, as opaque text for `since`.
 * @property {() => Promise<void>} close End it. No message is handled after that; resolves when the broker has replied.
 * @property {() => Promise<void>} unsubscribe The same.
 */

/**
 * An object from its start. Awaiting it, or `ready`, waits until the broker has accepted it.
 *
 * @template T
 * @typedef {T & PromiseLike<T> & {
 *   ready: Promise<T>,
 *   catch: Promise<T>['catch'],
 *   finally: Promise<T>['finally'],
 * }} Awaitable
 */

/**
 * A subscription from its start. Awaiting it, or `ready`, waits until the broker has accepted it.
 *
 * @typedef {Awaitable<Subscription>} SubscriptionHandle
 */

/**
 * How to publish.
 *
 * @typedef {object} PublishOptions
 * @property {boolean | undefined} [ephemeral] Whether it is delivered to present subscriptions only, without the log.
 * @property {boolean | undefined} [echo] false: it is not delivered to this client.
 * @property {boolean | undefined} [retain] Whether it becomes the retained message of its channel. The payload `null`
 *   removes that.
 * @property {number | undefined} [expect] With `retain`: publish only if this is the seq of the channel's retained message,
 *   0 for none. Otherwise it is rejected with the code `conflict`, and the present `seq`.
 */

/**
 * The retained message of a channel.
 *
 * @template [T=any]
 * @typedef {object} RetainedMessage
 * @property {T} payload Its payload.
 * @property {number} seq Its seq, for `expect`.
 * @property {number} at When it was committed, in milliseconds since 1970, by the log's clock.
 * @property {string | undefined} sender The `client_id` of the publisher, if it has one.
 */

/**
 * A change of the retained message of a channel.
 *
 * @template [T=any]
 * @typedef {object} RetainedChange
 * @property {string} channel The channel.
 * @property {RetainedMessage<T> | undefined} message Its retained message now; undefined if it has none.
 * @property {RetainedMessage<T> | undefined} previous The one before.
 */

/**
 * The end of a live map, or of a membership.
 *
 * @typedef {object} LiveOptions
 * @property {AbortSignalLike | undefined} [signal] Ends it, as `close()` or `leave()` does.
 * @property {((error: Error) => void) | undefined} [onEnd] Called once if it ends otherwise, with the reason.
 */

/** @typedef {LiveOptions} JoinOptions */

/**
 * A map by channel that follows the broker, as long as it is open.
 *
 * @template V, C
 * @typedef {ReadonlyMap<string, V> & {
 *   pattern: string,
 *   onChange(listener: (change: C) => void): () => void,
 *   close(): Promise<void>,
 * }} LiveMapOf
 */

/**
 * The retained messages of a pattern.
 *
 * @template [T=any]
 * @typedef {LiveMapOf<RetainedMessage<T>, RetainedChange<T>>} RetainedMap
 */

/**
 * A member of a channel: all sessions of one `client_id`, or one session without one.
 *
 * @template [I=any]
 * @typedef {object} Member
 * @property {string} channel The channel.
 * @property {string | undefined} clientId Its client_id, if it has one.
 * @property {string | undefined} session Otherwise: an opaque name of its session.
 * @property {number} sessions How many of its sessions are in the channel.
 * @property {I | undefined} info The info of the newest of them that has one.
 */

/**
 * A change of the members of a channel.
 *
 * @template [I=any]
 * @typedef {object} PresenceChange
 * @property {'join' | 'update' | 'leave'} action `update`: another `info` or number of sessions.
 * @property {string} channel The channel.
 * @property {Member<I>} member The member; after `leave`, as it was before.
 */

/**
 * The members of each channel of a pattern that has any.
 *
 * @template [I=any]
 * @typedef {LiveMapOf<readonly Member<I>[], PresenceChange<I>>} PresenceMap
 */

/**
 * A page of members.
 *
 * @template [I=any]
 * @typedef {object} MembersPage
 * @property {Member<I>[]} members In the order of their channels.
 * @property {string | undefined} next `after` of the next page; undefined: there is none.
 */

/**
 * A membership in a channel. It is restored on each connection until `leave()`.
 *
 * @typedef {object} Membership
 * @property {string} channel The channel.
 * @property {(info?: unknown) => Promise<void>} update Replace the info. Resolves when the broker has accepted it.
 * @property {() => Promise<void>} leave End it. Resolves when the broker has replied.
 */

/**
 * A membership from its start. Awaiting it, or `ready`, waits until the broker has accepted it.
 *
 * @typedef {Awaitable<Membership>} MembershipHandle
 */

/**
 * A page of messages from the log.
 *
 * @template [T=any]
 * @typedef {object} Page
 * @property {Message<T>[]} messages Oldest first.
 * @property {boolean} more Whether there are older ones in the requested range.
 * @property {string | undefined} cursor The position after the newest of them, or of the head if there are none, for
 *   `since`.
 */

/**
 * The range of a page.
 *
 * @typedef {object} HistoryOptions
 * @property {number | string | undefined} [after] Only messages after this cursor, or seq.
 * @property {number | string | undefined} [before] Only messages before the one with this cursor, or seq.
 * @property {number | undefined} [limit] The largest number of messages, the newest of them: default 100, within the limit
 *   of the broker.
 */

/**
 * The result of a publish. An ephemeral message has neither.
 *
 * @typedef {object} Published
 * @property {number} [seq] Its seq.
 * @property {boolean} [duplicate] Whether an earlier try had already published it.
 */

/**
 * The events of a client, by name.
 *
 * @typedef {object} Events
 * @property {ConnectionState} state The state has changed.
 * @property {'webtransport' | 'websocket'} transport Connected by this transport.
 * @property {Gap} gap Messages that may be missing from a subscription.
 * @property {{pattern: string, seq: number}} revoked The permission for a subscription was withdrawn; it has ended.
 * @property {{reason: string, reconnectIn: number}} goaway The replica is shutting down: the client moves by itself.
 * @property {Error} error An error outside of a call: a failed attempt to connect, the end of a subscription, a handler
 *   that rejected.
 */

export {};
