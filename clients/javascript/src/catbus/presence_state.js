/**
 * The members of each channel of a pattern.
 *
 * @module
 */

import { LiveState } from './live_maps.js';

/** @import { Member, PresenceChange } from './types.js' */

export class PresenceState extends LiveState {
  /** All members, by their name in their channel. @type {Map<string, Member>} */
  #members = new Map();

  /** Replace the state by that of a snapshot. @param {any[]} objects members, then what has changed meanwhile */
  snapshot(objects) {
    const members = new Map();
    for (const object of objects) {
      if (object.action === 'leave') members.delete(nameOf(object));
      else members.set(nameOf(object), asMember(object));
    }
    /** @type {PresenceChange[]} */
    const changes = [];
    for (const [name, member] of this.#members) if (!members.has(name)) changes.push({ action: 'leave', channel: member.channel, member });
    /** @type {Map<string, Member[]>} */
    const entries = new Map();
    for (const [name, member] of members) {
      const { channel } = member;
      const action = actionOf(this.#members.get(name), member);
      if (action) changes.push({ action, channel, member });
      entries.set(channel, entries.get(channel) ?? []);
      entries.get(channel)?.push(member);
    }
    this.#members = members;
    this.replace(entries, changes);
  }

  /** Take a change. The lists of members stay as they are: others replace them. @param {any} object */
  change(object) {
    const name = nameOf(object);
    const { channel } = object;
    const before = this.#members.get(name);
    const leaves = object.action === 'leave';
    const member = leaves && before ? before : asMember(object);
    const action = leaves ? before && 'leave' : actionOf(before, member);
    if (!action) return;
    if (leaves) this.#members.delete(name);
    else this.#members.set(name, member);
    const present = this.entries.get(channel) ?? [];
    const next = before ? present.flatMap((/** @type {Member} */ each) => (each !== before ? [each] : leaves ? [] : [member])) : [...present, member];
    if (next.length) this.entries.set(channel, next);
    else this.entries.delete(channel);
    this.tell([{ action, channel, member }]);
  }
}

/** @param {any} object */
function nameOf({ channel, client_id: clientId, session }) {
  return JSON.stringify([channel, clientId ?? null, session]);
}

/** @param {any} object @returns {Member} */
export function asMember({ channel, client_id: clientId, session, sessions, info }) {
  return { channel, clientId, session, sessions, info };
}

/** @param {Member | undefined} before @param {Member} member @returns {'join' | 'update' | undefined} */
function actionOf(before, member) {
  if (!before) return 'join';
  return before.sessions === member.sessions && json(before.info) === json(member.info) ? undefined : 'update';
}

/** @param {unknown} info */
function json(info) {
  return JSON.stringify(info, (_, value) => (typeof value === 'bigint' ? `${value}n` : value));
}
