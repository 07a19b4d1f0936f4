/**
 * The retained message of each channel of a pattern.
 *
 * @module
 */

import { LiveState } from './live_maps.js';

/** @import { RetainedMessage, RetainedChange } from './types.js' */

export class RetainedState extends LiveState {
  /** Replace the state by that of a snapshot: a channel that it has not has no retained message any more. @param {any[]} messages */
  snapshot(messages) {
    const before = this.entries;
    const next = new Map();
    // The broker may read a page again.
    for (const message of messages.sort((a, b) => a.seq - b.seq)) apply(next, message);
    const channels = new Set([...before.keys(), ...next.keys()]);
    this.replace(next, [...channels].flatMap((channel) => differences(channel, before.get(channel), next.get(channel))));
  }

  /** @param {{message: any}} what */
  message({ message }) {
    const previous = this.entries.get(message.channel);
    apply(this.entries, message);
    this.tell(differences(message.channel, previous, this.entries.get(message.channel)));
  }
}

/** Apply a message. One that was published without `retain` changes nothing. @param {Map<string, RetainedMessage>} entries @param {any} message */
function apply(entries, { channel, payload, seq, at, sender, retain }) {
  if (!retain) return;
  if (payload === null) entries.delete(channel);
  else entries.set(channel, { payload, seq, at, sender });
}

/**
 * The change of a channel, if there is one. A log of another epoch may have another message at the same seq.
 *
 * @param {string} channel @param {RetainedMessage | undefined} previous @param {RetainedMessage | undefined} message @returns {RetainedChange[]}
 */
function differences(channel, previous, message) {
  const same = previous?.seq === message?.seq && previous?.at === message?.at;
  return same ? [] : [{ channel, message, previous }];
}
