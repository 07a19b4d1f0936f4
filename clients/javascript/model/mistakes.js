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
    ['subscriptions.js', 'const feed = this.#answered(reply.id);\n    if (!feed?.asked)', 'const feed = this.#feeds.get(reply.pattern);\n    if (!feed?.asked)'],
  ],
  'after a lost connection only those are asked for that were heard': [1,
    ['subscriptions.js', 'this.#feeds.values()) if (feed.attached.length) this.#ask(feed);', 'this.#feeds.values()) if (feed.lane) this.#ask(feed);'],
  ],
  'the first cursor counts instead of the lowest': [2,
    ['feeds.js', 'Math.min(...together.map(({ cursor }) => Number(cursor)))', 'Number(first.cursor)'],
  ],
  'a message at the cursor is delivered again': [1, ['readers.js', 'if (seq <=', 'if (seq <']],
  'a subscription that is asked for is left without a word': [2,
    ['subscriptions.js', 'const known = feed.asked || (feed.lane', 'const known = (feed.lane'],
  ],
  'the first handler that leaves ends the subscription of all': [12,
    ['subscriptions.js', 'if (attached && !feed.attached.length) this.#leave(feed, settler);', 'if (attached) this.#leave(feed, settler);'],
  ],
  'newer publishes do not wait for those in doubt': [7,
    ['publishes.js', '    this.#doubts.add(id);\n    publish.tries++;', '    publish.tries++;'],
  ],
  'what has no answer is not sent again': [1,
    ['publishes.js', 'if (known) this.#sendAgain(publish, desk);', 'if (known) continue;'],
  ],
  'a refused retry holds up everything for ever': [1,
    ['publishes.js', '      this.#giveUp(publish, reason.message);', '      if (!publish) this.#giveUp(publish, reason.message);'],
    ['publishes.js', 'if (publish.at < moment - STUCK', 'if (publish.at < 0 * moment - STUCK'],
  ],
  'a publish that the broker does not answer waits for ever': [8,
    ['publishes.js', 'if (publish.at < moment - STUCK', 'if (publish.at < 0 * moment - STUCK'],
  ],
  'an error says nothing of the publish that it names': [1,
    ['incoming.js', 'else publishes.refused(id, reason) || requests', 'else requests'],
    ['publishes.js', 'if (publish.at < moment - STUCK', 'if (publish.at < 0 * moment - STUCK'],
  ],
  'a publish is new each time': [1,
    ['publishes.js', '"id":${id},"retry":true', '"id":${this.#host.nextId()},"retry":true'],
  ],
  'what a stopping replica gives back is dropped': [1,
    ['publishes.js', 'this.#unsent = [...again, ...this.#unsent];', 'void again;'],
  ],
  'subscriptions stay when somebody else signs in': [3,
    ['subscriptions.js', 'if (reader.owner === undefined || reader.owner === clientId) continue;', 'if (reader) continue;'],
  ],
  'the local clock says when a token expires': [4,
    ['tokens.js', '  if (life > 0 && !(left > 0 && left <= life)) left = life;\n  else if', '  if (life < 0) left = life;\n  else if'],
    ['tokens.js', 'return Math.max(SHORTEST_REFRESH, left / 2,', 'return Math.max(0, left / 2,'],
    ['tokens.js', 'return REFRESH_BEFORE;\n', 'return 0;\n'],
    ['upkeep.js', 'Math.max(delay, floor)', 'delay'],
  ],
  'a gap moves no cursor': [1, ['readers.js', '    this.move(to, epoch);\n', '']],
  'a gap of one handler is taken for that of all': [7,
    ['readers.js', '(epoch === present ? cursor >= since : cursor === since)', 'cursor >= since'],
  ],
  'what is new does not wait for the past': [1, ['subscriptions.js', 'reader.held = [];', 'reader.past = [];']],
  'a handler that goes on is not asked for': [3,
    ['subscriptions.js', "    reader.phase = 'waiting';\n    reader.live = false;\n    this.#ask(reader.feed);", "    reader.phase = 'waiting';\n    reader.live = false;"],
  ],
  'a subscription that was refused for now is not asked for again': [12,
    ['subscriptions.js', '      this.#again.add(feed);\n', ''],
  ],
  'a connection that is lost is not made again': [1,
    ['supervisor.js', "    this.#host.timers.set('reconnect', delay, () => this.#redial());\n", ''],
  ],
  'a connection on which nothing comes is kept': [3,
    ['upkeep.js', 'if (!link.pings.has(seq) || link.heard > asked) return;', 'if (link) return;'],
  ],
  'the session ends with the page that waits for its past': [7, ['requests.js', 'if (!kept) ', '']],
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
