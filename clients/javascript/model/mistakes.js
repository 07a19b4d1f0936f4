/**
 * Planted mistakes: each is a change of the source, and the model has to find it.
 *
 * First a seed that finds it soon, or the steps that find it, then `[file, present text, changed text]`. The present text occurs
 * once in the file.
 */

import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

import { loadModules } from './modules.js';

export const MISTAKES = {
  'a late reply counts after a newer request': [25,
    ['subscription_manager.js', 'const subscription = this.#takeRequest(reply.id);\n    if (!subscription?.request)', 'const subscription = this.#byPattern.get(reply.pattern);\n    if (!subscription?.request)'],
  ],
  'after a lost connection only active subscriptions are requested': [1,
    ['subscription_manager.js', 'this.#byPattern.values()) if (subscription.attached.length) this.#sendSubscribe(subscription);', 'this.#byPattern.values()) if (subscription.incoming) this.#sendSubscribe(subscription);'],
  ],
  'the first cursor counts instead of the lowest': [
    [
      { step: 'subscribe', pattern: '*', start: { since: 3, epoch: 'e1' } },
      { step: 'subscribe', pattern: '*', start: { since: 0, epoch: 'e1' } },
    ],
    ['shared_subscription.js', 'Math.min(...together.map(({ cursor }) => Number(cursor)))', 'Number(first.cursor)'],
  ],
  'a message at the cursor is delivered again': [1, ['subscriber.js', 'if (seq <=', 'if (seq <']],
  'a requested subscription is closed without an unsubscribe': [9,
    ['subscription_manager.js', '    subscription.heldIds.add(id);\n', ''],
  ],
  'the first handler that leaves ends the subscription of all': [2,
    ['subscription_manager.js', 'if (attached && !subscription.attached.length) return', 'if (attached) return'],
  ],
  'newer publishes do not wait for uncertain ones': [147,
    ['in_flight_publishes.js', '    this.#uncertain.add(id);\n    publish.tries++;', '    publish.tries++;'],
  ],
  'a publish without a reply is not retried': [1,
    ['in_flight_publishes.js', 'if (known) this.#retryPublish(publish, connection);', 'if (known) continue;'],
  ],
  'a rejected retry blocks all publishes for ever': [1,
    ['in_flight_publishes.js', '      this.#settleUnknown(publish, reason.message);', '      if (!publish) this.#settleUnknown(publish, reason.message);'],
    ['in_flight_publishes.js', 'if (publish.at < moment - REPLY_TIMEOUT', 'if (publish.at < 0 * moment - REPLY_TIMEOUT'],
  ],
  'a publish without a reply waits for ever': [13,
    ['in_flight_publishes.js', 'if (publish.at < moment - REPLY_TIMEOUT', 'if (publish.at < 0 * moment - REPLY_TIMEOUT'],
  ],
  'an error does not settle the publish that it names': [1,
    ['message_handlers.js', 'else publishes.refused(id, reason) || requests', 'else requests'],
    ['in_flight_publishes.js', 'if (publish.at < moment - REPLY_TIMEOUT', 'if (publish.at < 0 * moment - REPLY_TIMEOUT'],
  ],
  'a retry gets a new id': [1,
    ['in_flight_publishes.js', '"id":${id},"retry":true', '"id":${this.#host.nextId()},"retry":true'],
  ],
  'a publish that a draining replica rejects is dropped': [4,
    ['in_flight_publishes.js', 'this.#unsent = [...again, ...this.#unsent];', 'void again;'],
  ],
  'subscriptions stay when another client_id signs in': [7,
    ['subscription_manager.js', 'if (subscriber.owner === undefined || subscriber.owner === clientId) continue;', 'if (subscriber) continue;'],
  ],
  'the local clock says when a token expires': [18,
    ['token_renewal.js', '  if (life > 0 && !(left > 0 && left <= life)) left = life;\n  else if', '  if (life < 0) left = life;\n  else if'],
    ['token_renewal.js', 'return Math.max(MIN_RENEWAL_DELAY, left / 2,', 'return Math.max(0, left / 2,'],
    ['token_renewal.js', 'return RENEWAL_MARGIN;\n', 'return 0;\n'],
    ['keepalive.js', 'Math.max(delay, floor)', 'delay'],
  ],
  'a gap does not move the cursor': [1, ['subscriber.js', '    this.moveTo(to, epoch);\n', '']],
  'a gap of one handler is taken for that of all': [
    [
      { step: 'restore', back: 0 },
      { step: 'subscribe', pattern: 'a.*', start: { since: 0, epoch: 'e1' } },
      { step: 'subscribe', pattern: 'a.*', start: { since: 3, epoch: 'e1' } },
    ],
    ['subscriber.js', '(of === present ? this.cursor >= from : this.cursor === from)', 'this.cursor >= from'],
  ],
  'new messages do not wait for the history': [2, ['subscription_manager.js', 'subscriber.buffered = [];', 'subscriber.history = [];']],
  'a resumed handler is not requested': [3,
    ['subscription_manager.js', "    subscriber.phase = 'requested';\n    subscriber.live = false;\n    this.#sendSubscribe(subscriber.subscription);", "    subscriber.phase = 'requested';\n    subscriber.live = false;"],
  ],
  'a subscription rejected for now is not requested again': [38,
    ['subscription_manager.js', '      this.#toRetry.add(subscription);\n', ''],
  ],
  'the client does not reconnect': [1,
    ['connection_supervisor.js', "    this.#host.timers.set('reconnect', delay, () => this.#connectNow());\n", ''],
  ],
  'a silent connection is kept': [4,
    ['keepalive.js', 'if (!connection.pings.has(seq) || connection.heard > asked) return;', 'if (connection) return;'],
  ],
  'a map resumes at the position of a snapshot that is not complete': [1, ['retained_feed.js', '    this.cursor = undefined;\n', '    this.cursor = seq;\n']],
  'a map takes no snapshot after a gap': [1, ['retained_feed.js', 'epoch !== this.epoch || to > this.cursor', 'epoch === this.epoch && to > this.cursor']],
  'a map takes no snapshot after a gap of retention': [38, ['retained_feed.js', 'epoch !== this.epoch || to > this.cursor', 'epoch !== this.epoch']],
  'a map keeps the channels that a snapshot has not': [118, ['retained_state.js', 'this.replace(next,', 'this.replace(new Map([...before, ...next]),']],
  'listeners are not told which channels a snapshot has not': [118, ['retained_state.js', '[...before.keys(), ...next.keys()]', '[...next.keys()]']],
  'listeners are told of every channel of a snapshot': [1, ['retained_state.js', 'return same ? [] :', 'return same && !message ? [] :']],
  'a map shows a snapshot before the messages that follow it': [67,
    ['retained_feed.js', "type !== 'live' || !snapshot.complete", '!snapshot.complete'],
  ],
  'a message without retain changes a map': [1, ['retained_state.js', 'if (!retain) return;', '']],
  'handlers skip what another connection would still bring': [1, ['shared_subscription.js', 'retained && since === undefined && this.incoming === incoming && !incoming.own', 'retained && since === undefined']],
  'a map and a handler are requested at one cursor': [3, ['shared_subscription.js', 'if (!first || snapshot)', 'if (!first)']],
  'the first map that closes ends the feed of all': [27, ['live_maps.js', 'if (!feed || maps.size)', 'if (!feed)']],
  'the members of an earlier connection count': [74, ['presence_feed.js', '  follow() {\n    this.#snapshot = {', '  follow() {\n    this.#snapshot ??= {']],
  'changes during a snapshot are dropped': [1, ['presence_feed.js', '[...members, ...changes]', 'members']],
  'a snapshot that replaces dropped changes counts as the end of them': [
    [
      { step: 'openMap', kind: 'presence', pattern: '*' },
      ...Array.from({ length: 5 }, () => ({ step: 'run', ms: 1000 })),
      { step: 'full', number: 0, full: true },
      { step: 'othersLeave', channel: 'b', member: 'carol' },
      { step: 'work', number: 0, count: 1 },
    ],
    ['presence_feed.js', 'this.#snapshot ??=', 'if (!this.#snapshot) return [];\n      this.#snapshot ??='],
  ],
  'members stay that a snapshot has not': [15, ['presence_state.js', 'if (!members.has(name)) changes.push', 'if (!name) changes.push']],
  'listeners are told of members that have not changed': [2, ['presence_state.js', '=== json(member.info) ? undefined', '=== json(member) ? undefined']],
  'channels are not joined again': [1, ['memberships.js', '    for (const membership of this.#byChannel.values()) this.#send(membership);', '']],
  'a join without a reply is never settled': [1, ['memberships.js', '      membership.waiting.push(...waiting);\n', '']],
  'a channel is joined again under another client_id': [1, ['memberships.js', 'membership.owner !== undefined && membership.owner !== clientId', 'membership.owner === clientId && !clientId']],
  'the first handle that leaves ends the membership': [1, ['memberships.js', '    if (others.length) {', '    if (others.length > 9) {']],
  'the membership keeps the info of a handle that left': [
    [{ step: 'join', channel: 'a.x', info: 1 }, { step: 'join', channel: 'a.x', info: 2 }, { step: 'run', ms: 1000 }, { step: 'leave', number: 1 }],
    ['memberships.js', 'if (others.at(-1)?.info !== membership.sent) this', 'if (!others) this'],
  ],
  'a join rejected for now is not sent again': [[{ step: 'busy', number: 0 }, { step: 'join', channel: 'a.x', info: 1 }], ['memberships.js', '() => membership.newest === undefined && this', '() => membership.newest !== undefined && this']],
  'a wrong info ends the membership': [[{ step: 'join', channel: 'a.x', info: 1 }, { step: 'run', ms: 1000 }, { step: 'updateMembership', number: 0, info: 'wrong' }], ['memberships.js', 'holder.accepted && holder.accepted.info === info', 'holder.accepted']],
  'a conflict of a retry is certain': [
    [
      { step: 'othersRetained', channel: 'a.x', removed: true },
      { step: 'hang', number: 0 },
      { step: 'publishRetained', channel: 'a.x', expect: null },
      { step: 'work', number: 0, count: 1 },
      { step: 'cut' },
      { step: 'othersRetained', channel: 'a.x', removed: false },
      { step: 'run', ms: 20_000 },
      { step: 'othersRetained', channel: 'a.x', removed: true },
      { step: 'databaseResponds', number: 0 },
    ],
    ['in_flight_publishes.js', " === 'conflict' && !publish.expectsNone", " === 'conflict'"],
  ],
  'a conflict of a retry is never certain': [1, ['in_flight_publishes.js', " === 'conflict' && !publish.expectsNone", " === 'no conflict'"]],
  'a sign-out drops the history of a subscription': [
    [
      { step: 'subscribe', pattern: 'a.*', start: { last: 1 } },
      { step: 'work', number: 0, count: 1 },
      { step: 'bring', number: 0, size: 65 },
      { step: 'disconnect' },
    ],
    ['in_flight_requests.js', 'if (!kept) ', ''],
  ],
};

/** Call a function with the modules of a client that has a mistake. */
export async function withMistake(changes, use) {
  const directory = await mkdtemp(join(tmpdir(), 'catbus-mistake-'));
  try {
    await writeFile(join(directory, 'package.json'), '{"type": "module"}');
    await cp(new URL('../src/catbus/', import.meta.url), join(directory, 'catbus'), { recursive: true });
    for (const [file, right, wrong] of changes) {
      const path = join(directory, 'catbus', file);
      const text = await readFile(path, 'utf8');
      if (text.split(right).length !== 2) throw new Error(`${file} does not have once: ${right}`);
      await writeFile(path, text.replace(right, () => wrong));
    }
    return await use(await loadModules(pathToFileURL(join(directory, 'catbus/'))));
  } finally {
    await rm(directory, { recursive: true });
  }
}
