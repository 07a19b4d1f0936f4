/**
 * The Catbus client for browsers, workers and Node: WebTransport first, WebSocket when it must be.
 *
 * It speaks `catbus.v1` (protocol/README.md; sections are named where a rule comes from), runs as it stands from
 * `<script type="module">`, and depends on nothing. Its modules are in `catbus/`: a core without promises or I/O (`core.js`
 * and what it imports), and around it what drives it (`driver.js`) and the public calls (`client.js`).
 *
 * @module
 */

export { CatbusClient } from './catbus/client.js';
export { CatbusError, DisconnectedError, RefusedError } from './catbus/errors.js';
// The names of the first release.
export { DisconnectedError as Disconnected, RefusedError as Refused } from './catbus/errors.js';

/**
 * A signal to stop.
 *
 * @typedef {import('./catbus/types.js').AbortSignalLike} AbortSignalLike
 */
/**
 * How a client is connected.
 *
 * @typedef {import('./catbus/types.js').ConnectionState} ConnectionState
 */
/**
 * What a client tells of, by name.
 *
 * @typedef {import('./catbus/types.js').Events} Events
 */
/**
 * What may be missing from a subscription.
 *
 * @typedef {import('./catbus/types.js').Gap} Gap
 */
/**
 * Which messages of the past.
 *
 * @typedef {import('./catbus/types.js').HistoryOptions} HistoryOptions
 */
/**
 * How a client is made.
 *
 * @typedef {import('./catbus/types.js').Options} Options
 */
/**
 * What became of a publish.
 *
 * @typedef {import('./catbus/types.js').Published} Published
 */
/**
 * Where cursors are kept over a reload.
 *
 * @typedef {import('./catbus/types.js').StorageLike} StorageLike
 */
/**
 * Where a subscription starts, and whom it tells.
 *
 * @typedef {import('./catbus/types.js').SubscribeOptions} SubscribeOptions
 */
/**
 * A subscription.
 *
 * @typedef {import('./catbus/types.js').Subscription} Subscription
 */
/**
 * A subscription from the moment it is asked for.
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
 * Messages of the past.
 *
 * @template [T=any]
 * @typedef {import('./catbus/types.js').Page<T>} Page
 */
