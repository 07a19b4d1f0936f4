/**
 * Mistakes made on purpose: each is a change of the source, and the model has to find it.
 *
 * First the seed by which it is found soon, then `[file, what stands there, what shall]`; what stands there stands there once.
 */

import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

export const MISTAKES = {
  'a late answer counts, whatever was asked since': [5,
    ['subscription_manager.js', 'const subscription = this.#takeRequest(reply.id);\n    if (!subscription?.request)', 'const subscription = this.#byPattern.get(reply.pattern);\n    if (!subscription?.request)'],
  ],
  'after a lost connection only those are asked for that were heard': [1,
    ['subscription_manager.js', 'this.#byPattern.values()) if (subscription.attached.length) this.#sendSubscribe(subscription);', 'this.#byPattern.values()) if (subscription.incoming) this.#sendSubscribe(subscription);'],
  ],
  'the first cursor counts instead of the lowest': [2,
    ['shared_subscription.js', 'Math.min(...together.map(({ cursor }) => Number(cursor)))', 'Number(first.cursor)'],
  ],
  'a message at the cursor is delivered again': [1, ['subscriber.js', 'if (seq <=', 'if (seq <']],
  'a subscription that is asked for is left without a word': [2,
    ['subscription_manager.js', 'const known = subscription.request || (subscription.incoming', 'const known = (subscription.incoming'],
  ],
  'the first handler that leaves ends the subscription of all': [12,
    ['subscription_manager.js', 'if (attached && !subscription.attached.length) this.#sendUnsubscribe(subscription, settler);', 'if (attached) this.#sendUnsubscribe(subscription, settler);'],
  ],
  'newer publishes do not wait for those in doubt': [7,
    ['in_flight_publishes.js', '    this.#uncertain.add(id);\n    publish.tries++;', '    publish.tries++;'],
  ],
  'what has no answer is not sent again': [1,
    ['in_flight_publishes.js', 'if (known) this.#retryPublish(publish, connection);', 'if (known) continue;'],
  ],
  'a refused retry holds up everything for ever': [1,
    ['in_flight_publishes.js', '      this.#settleUnknown(publish, reason.message);', '      if (!publish) this.#settleUnknown(publish, reason.message);'],
    ['in_flight_publishes.js', 'if (publish.at < moment - REPLY_TIMEOUT', 'if (publish.at < 0 * moment - REPLY_TIMEOUT'],
  ],
  'a publish that the broker does not answer waits for ever': [8,
    ['in_flight_publishes.js', 'if (publish.at < moment - REPLY_TIMEOUT', 'if (publish.at < 0 * moment - REPLY_TIMEOUT'],
  ],
  'an error says nothing of the publish that it names': [1,
    ['message_handlers.js', 'else publishes.refused(id, reason) || requests', 'else requests'],
    ['in_flight_publishes.js', 'if (publish.at < moment - REPLY_TIMEOUT', 'if (publish.at < 0 * moment - REPLY_TIMEOUT'],
  ],
  'a publish is new each time': [1,
    ['in_flight_publishes.js', '"id":${id},"retry":true', '"id":${this.#host.nextId()},"retry":true'],
  ],
  'what a stopping replica gives back is dropped': [1,
    ['in_flight_publishes.js', 'this.#unsent = [...again, ...this.#unsent];', 'void again;'],
  ],
  'subscriptions stay when somebody else signs in': [3,
    ['subscription_manager.js', 'if (subscriber.owner === undefined || subscriber.owner === clientId) continue;', 'if (subscriber) continue;'],
  ],
  'the local clock says when a token expires': [4,
    ['token_renewal.js', '  if (life > 0 && !(left > 0 && left <= life)) left = life;\n  else if', '  if (life < 0) left = life;\n  else if'],
    ['token_renewal.js', 'return Math.max(MIN_RENEWAL_DELAY, left / 2,', 'return Math.max(0, left / 2,'],
    ['token_renewal.js', 'return RENEWAL_MARGIN;\n', 'return 0;\n'],
    ['keepalive.js', 'Math.max(delay, floor)', 'delay'],
  ],
  'a gap moves no cursor': [1, ['subscriber.js', '    this.moveTo(to, epoch);\n', '']],
  'a gap of one handler is taken for that of all': [7,
    ['subscriber.js', '(epoch === present ? cursor >= since : cursor === since)', 'cursor >= since'],
  ],
  'what is new does not wait for the past': [1, ['subscription_manager.js', 'subscriber.buffered = [];', 'subscriber.history = [];']],
  'a handler that goes on is not asked for': [3,
    ['subscription_manager.js', "    subscriber.phase = 'requested';\n    subscriber.live = false;\n    this.#sendSubscribe(subscriber.subscription);", "    subscriber.phase = 'requested';\n    subscriber.live = false;"],
  ],
  'a subscription that was refused for now is not asked for again': [12,
    ['subscription_manager.js', '      this.#toRetry.add(subscription);\n', ''],
  ],
  'a connection that is lost is not made again': [1,
    ['connection_supervisor.js', "    this.#host.timers.set('reconnect', delay, () => this.#connectNow());\n", ''],
  ],
  'a connection on which nothing comes is kept': [3,
    ['keepalive.js', 'if (!connection.pings.has(seq) || connection.heard > asked) return;', 'if (connection) return;'],
  ],
  'the session ends with the page that waits for its past': [7, ['in_flight_requests.js', 'if (!kept) ', '']],
};

/** Have something done with the core that has a mistake. */
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
