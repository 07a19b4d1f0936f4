/**
 * The Catbus client for browsers, workers and Node: WebTransport first, WebSocket when it must be.
 *
 * It speaks `catbus.v1` (protocol/README.md; sections are named where a rule comes from), runs unchanged from
 * `<script type="module">`, and depends on nothing. Its modules are in `catbus/`: a core without promises or I/O (`core.js`
 * and what it imports), and around it the driver (`driver.js`) and the public calls (`client.js`).
 *
 * @module
 */

export { CatbusClient } from './catbus/client.js';
export { CatbusError, DisconnectedError, RefusedError } from './catbus/errors.js';
// The names of the first release.
export { DisconnectedError as Disconnected, RefusedError as Refused } from './catbus/errors.js';

/**
 * An abort signal.
 *
 * @typedef {import('./catbus/types.js').AbortSignalLike} AbortSignalLike
 */
/**
 * The state of a client.
 *
 * @typedef {import('./catbus/types.js').ConnectionState} ConnectionState
 */
/**
 * The events of a client, by name.
 *
 * @typedef {import('./catbus/types.js').Events} Events
 */
/**
 * Messages that may be missing from a subscription.
 *
 * @typedef {import('./catbus/types.js').Gap} Gap
 */
/**
 * The range of a page.
 *
 * @typedef {import('./catbus/types.js').HistoryOptions} HistoryOptions
 */
/**
 * The options of a client.
 *
 * @typedef {import('./catbus/types.js').Options} Options
 */
/**
 * How to publish.
 *
 * @typedef {import('./catbus/types.js').PublishOptions} PublishOptions
 */
/**
 * The result of a publish.
 *
 * @typedef {import('./catbus/types.js').Published} Published
 */
/**
 * Storage for cursors that survives a reload.
 *
 * @typedef {import('./catbus/types.js').StorageLike} StorageLike
 */
/**
 * The start of a subscription, and its callbacks.
 *
 * @typedef {import('./catbus/types.js').SubscribeOptions} SubscribeOptions
 */
/**
 * A subscription.
 *
 * @typedef {import('./catbus/types.js').Subscription} Subscription
 */
/**
 * A subscription from its start.
 *
 * @typedef {import('./catbus/types.js').SubscriptionHandle} SubscriptionHandle
 */
/**
 * A WebSocket, as browsers and `ws` have it.
 *
 * @typedef {import('./catbus/types.js').WebSocketLike} WebSocketLike
 */
/**
 * A message.
 *
 * @template [T=any]
 * @typedef {import('./catbus/types.js').Message<T>} Message
 */
/**
 * A page of messages from the log.
 *
 * @template [T=any]
 * @typedef {import('./catbus/types.js').Page<T>} Page
 */
/**
 * The retained message of a channel.
 *
 * @template [T=any]
 * @typedef {import('./catbus/types.js').RetainedMessage<T>} RetainedMessage
 */
/**
 * A change of a retained message.
 *
 * @template [T=any]
 * @typedef {import('./catbus/types.js').RetainedChange<T>} RetainedChange
 */
/**
 * The retained messages of a pattern.
 *
 * @template [T=any]
 * @typedef {import('./catbus/types.js').RetainedMap<T>} RetainedMap
 */
/**
 * A member of a channel.
 *
 * @template [I=any]
 * @typedef {import('./catbus/types.js').Member<I>} Member
 */
/**
 * A change of the members of a channel.
 *
 * @template [I=any]
 * @typedef {import('./catbus/types.js').PresenceChange<I>} PresenceChange
 */
/**
 * The members of each channel of a pattern.
 *
 * @template [I=any]
 * @typedef {import('./catbus/types.js').PresenceMap<I>} PresenceMap
 */
/**
 * A page of members.
 *
 * @template [I=any]
 * @typedef {import('./catbus/types.js').MembersPage<I>} MembersPage
 */
/**
 * The end of a live map, or of a membership.
 *
 * @typedef {import('./catbus/types.js').LiveOptions} LiveOptions
 */
/**
 * A membership.
 *
 * @typedef {import('./catbus/types.js').Membership} Membership
 */
/**
 * A membership from its start.
 *
 * @typedef {import('./catbus/types.js').MembershipHandle} MembershipHandle
 */
