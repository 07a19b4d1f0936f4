/**
 * The messages of a broker, and their handlers.
 *
 * @module
 */

import { RefusedError } from './errors.js';

/** @typedef {import('./core.js').Core} Core */
/** @typedef {import('./connection.js').IncomingStream} IncomingStream */

/** @param {any} object */
function errorFrom({ code = 'internal', message = code, retry_after: retryAfter, seq }) {
  return new RefusedError(code, message, retryAfter, seq);
}

/** Handle the rejection of any request: with its own error type, or an `error` with its id. @param {Core} core @param {any} object */
function refused(core, object) {
  const { publishes, requests, subscriptions, memberships } = core;
  const reason = errorFrom(object);
  const { id } = object;
  // An unknown id is of a request that is already settled.
  if (id === undefined) core.emit('error', reason);
  else publishes.refused(id, reason) || requests.answered(id, reason) || subscriptions.refused(id, reason) || memberships.refused(id, reason);
}

/** @param {any} object @param {IncomingStream} incoming */
function updateHead(object, incoming) {
  const seq = object.type === 'gap' ? object.to : object.seq;
  if (!object.epoch) return;
  // Another stream may already be in a later epoch than the one in which a subscription's own stream begins.
  if (object.type === 'subscribed' && incoming.own) incoming.epoch = object.epoch;
  else incoming.connection.advance(seq ?? 0, object.epoch, incoming);
}

/** @type {Record<string, (core: Core, object: any, incoming: IncomingStream) => void>} */
export const HANDLERS = {
  message: (core, object, incoming) => core.subscriptions.message(object, incoming),
  auth_ok: (core, object, incoming) => core.authenticated(incoming.connection, object),
  auth_error: (core, object, incoming) => core.authFailed(incoming.connection, errorFrom({ code: 'unauthenticated', ...object })),
  published: (core, { id, seq, duplicate }, { connection }) => {
    if (seq > connection.head) connection.head = seq;
    core.publishes.published(id, seq, duplicate === true);
  },
  publish_error: refused,
  subscribe_error: refused,
  error: refused,
  history: (core, object) => void core.requests.answered(object.id, undefined, object),
  pong: (core, object, incoming) => core.pong(incoming.connection, object),
  subscribed: (core, object, incoming) => {
    updateHead(object, incoming);
    core.subscriptions.subscribed(object, incoming);
  },
  unsubscribed: (core, object, incoming) => core.subscriptions.unsubscribed(object, incoming.connection),
  revoked: (core, object, incoming) => core.subscriptions.revoked(object, incoming),
  live: (core, object, incoming) => core.subscriptions.live(object, incoming),
  head: (core, object, incoming) => {
    updateHead(object, incoming);
    core.subscriptions.head(object, incoming);
  },
  gap: (core, object, incoming) => {
    updateHead(object, incoming);
    core.subscriptions.gap(object, incoming);
  },
  retained: (core, object, incoming) => core.subscriptions.feed(object, incoming),
  presence: (core, object, incoming) => core.subscriptions.feed(object, incoming),
  members: (core, object, incoming) => {
    if (object.pattern === undefined) core.requests.answered(object.id, undefined, object);
    else core.subscriptions.feed(object, incoming);
  },
  joined: (core, { id }) => core.memberships.joined(id),
  left: (core, object, { connection }) => core.memberships.left(object, connection),
  goaway: (core, object, incoming) => core.leaving(incoming.connection, object),
};
