/**
 * Planted mistakes: each is a change of the source, and the model has to find it.
 *
 * First a seed that finds it soon, then `[file, present text, changed text]`. The present text occurs once in the file.
 */

import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

export const MISTAKES = {
  'a late reply counts after a newer request': [5,
    ['subscription_manager.js', 'const subscription = this.#takeRequest(reply.id);\n    if (!subscription?.request)', 'const subscription = this.#byPattern.get(reply.pattern);\n    if (!subscription?.request)'],
  ],
  'after a lost connection only active subscriptions are requested': [1,
    ['subscription_manager.js', 'this.#byPattern.values()) if (subscription.attached.length) this.#sendSubscribe(subscription);', 'this.#byPattern.values()) if (subscription.incoming) this.#sendSubscribe(subscription);'],
  ],
  'the first cursor counts instead of the lowest': [2,
    ['shared_subscription.js', 'Math.min(...together.map(({ cursor }) => Number(cursor)))', 'Number(first.cursor)'],
  ],
  'a message at the cursor is delivered again': [1, ['subscriber.js', 'if (seq <=', 'if (seq <']],
  'a requested subscription is closed without an unsubscribe': [2,
    ['subscription_manager.js', '    subscription.heldIds.add(id);\n', ''],
  ],
  'the first handler that leaves ends the subscription of all': [12,
    ['subscription_manager.js', 'if (attached && !subscription.attached.length) this.#sendUnsubscribe(subscription, settler);', 'if (attached) this.#sendUnsubscribe(subscription, settler);'],
  ],
  'newer publishes do not wait for uncertain ones': [7,
    ['in_flight_publishes.js', '    this.#uncertain.add(id);\n    publish.tries++;', '    publish.tries++;'],
  ],
  'a publish without a reply is not retried': [1,
    ['in_flight_publishes.js', 'if (known) this.#retryPublish(publish, connection);', 'if (known) continue;'],
  ],
  'a rejected retry blocks all publishes for ever': [1,
    ['in_flight_publishes.js', '      this.#settleUnknown(publish, reason.message);', '      if (!publish) this.#settleUnknown(publish, reason.message);'],
    ['in_flight_publishes.js', 'if (publish.at < moment - REPLY_TIMEOUT', 'if (publish.at < 0 * moment - REPLY_TIMEOUT'],
  ],
  'a publish without a reply waits for ever': [8,
    ['in_flight_publishes.js', 'if (publish.at < moment - REPLY_TIMEOUT', 'if (publish.at < 0 * moment - REPLY_TIMEOUT'],
  ],
  'an error does not settle the publish that it names': [1,
    ['message_handlers.js', 'else publishes.refused(id, reason) || requests', 'else requests'],
    ['in_flight_publishes.js', 'if (publish.at < moment - REPLY_TIMEOUT', 'if (publish.at < 0 * moment - REPLY_TIMEOUT'],
  ],
  'a retry gets a new id': [1,
    ['in_flight_publishes.js', '"id":${id},"retry":true', '"id":${this.#host.nextId()},"retry":true'],
  ],
  'a publish that a draining replica rejects is dropped': [1,
    ['in_flight_publishes.js', 'this.#unsent = [...again, ...this.#unsent];', 'void again;'],
  ],
  'subscriptions stay when another client_id signs in': [3,
    ['subscription_manager.js', 'if (subscriber.owner === undefined || subscriber.owner === clientId) continue;', 'if (subscriber) continue;'],
  ],
  'the local clock says when a token expires': [4,
    ['token_renewal.js', '  if (life > 0 && !(left > 0 && left <= life)) left = life;\n  else if', '  if (life < 0) left = life;\n  else if'],
    ['token_renewal.js', 'return Math.max(MIN_RENEWAL_DELAY, left / 2,', 'return Math.max(0, left / 2,'],
    ['token_renewal.js', 'return RENEWAL_MARGIN;\n', 'return 0;\n'],
    ['keepalive.js', 'Math.max(delay, floor)', 'delay'],
  ],
  'a gap does not move the cursor': [1, ['subscriber.js', '    this.moveTo(to, epoch);\n', '']],
  'a gap of one handler is taken for that of all': [7,
    ['subscriber.js', '(epoch === present ? cursor >= since : cursor === since)', 'cursor >= since'],
  ],
  'new messages do not wait for the history': [1, ['subscription_manager.js', 'subscriber.buffered = [];', 'subscriber.history = [];']],
  'a resumed handler is not requested': [3,
    ['subscription_manager.js', "    subscriber.phase = 'requested';\n    subscriber.live = false;\n    this.#sendSubscribe(subscriber.subscription);", "    subscriber.phase = 'requested';\n    subscriber.live = false;"],
  ],
  'a subscription rejected for now is not requested again': [12,
    ['subscription_manager.js', '      this.#toRetry.add(subscription);\n', ''],
  ],
  'the client does not reconnect': [1,
    ['connection_supervisor.js', "    this.#host.timers.set('reconnect', delay, () => this.#connectNow());\n", ''],
  ],
  'a silent connection is kept': [3,
    ['keepalive.js', 'if (!connection.pings.has(seq) || connection.heard > asked) return;', 'if (connection) return;'],
  ],
  'a sign-out drops the history of a subscription': [7, ['in_flight_requests.js', 'if (!kept) ', '']],
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
    return await use(await import(pathToFileURL(join(directory, 'catbus', 'core.js'))));
  } finally {
    await rm(directory, { recursive: true });
  }
}
