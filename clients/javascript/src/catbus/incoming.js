/**
 * What a broker can say, and whom it is for.
 *
 * @module
 */

import { RefusedError } from './errors.js';

/** @typedef {import('./core.js').Core} Core */
/** @typedef {import('./link.js').Lane} Lane */

/** @param {any} object */
function reasonOf({ code = 'internal', message = code, retry_after: retryAfter }) {
  return new RefusedError(code, message, retryAfter);
}

/** A refusal of any request: one of a kind of its own, or `error` with the id of what was not understood. @param {Core} core @param {any} object */
function refused(core, object) {
  const { publishes, requests, subscriptions } = core;
  const reason = reasonOf(object);
  const { id } = object;
  // One that nobody waits for is late: its request has been settled otherwise.
  if (id === undefined) core.emit('error', reason);
  else publishes.refused(id, reason) || requests.answered(id, reason) || subscriptions.refused(id, reason);
}

/** @param {any} object @param {Lane} lane */
function learn(object, lane) {
  const seq = object.type === 'gap' ? object.to : object.seq;
  if (!object.epoch) return;
  // Other streams may have told of a later epoch than the one in which a subscription's own stream begins.
  if (object.type === 'subscribed' && lane.own) lane.epoch = object.epoch;
  else lane.link.advance(seq ?? 0, object.epoch, lane);
}

/** @type {Record<string, (core: Core, object: any, lane: Lane) => void>} */
export const HANDLERS = {
  message: (core, object, lane) => core.subscriptions.message(object, lane),
  auth_ok: (core, object, lane) => core.authenticated(lane.link, object),
  auth_error: (core, object, lane) => core.notAuthenticated(lane.link, reasonOf({ code: 'unauthenticated', ...object })),
  published: (core, { id, seq, duplicate }, { link }) => {
    if (seq > link.head) link.head = seq;
    core.publishes.published(id, seq, duplicate === true);
  },
  publish_error: refused,
  subscribe_error: refused,
  error: refused,
  history: (core, object) => void core.requests.answered(object.id, undefined, object),
  pong: (core, object, lane) => core.ponged(lane.link, object),
  subscribed: (core, object, lane) => {
    learn(object, lane);
    core.subscriptions.subscribed(object, lane);
  },
  unsubscribed: (core, object, lane) => core.subscriptions.unsubscribed(object, lane.link),
  revoked: (core, object, lane) => core.subscriptions.revoked(object, lane),
  live: (core, object, lane) => core.subscriptions.live(object, lane),
  head: (core, object, lane) => {
    learn(object, lane);
    core.subscriptions.head(object, lane);
  },
  gap: (core, object, lane) => {
    learn(object, lane);
    core.subscriptions.gap(object, lane);
  },
  goaway: (core, object, lane) => core.leaving(lane.link, object),
};
