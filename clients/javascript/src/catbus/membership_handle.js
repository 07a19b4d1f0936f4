/**
 * The membership object of the application.
 *
 * @module
 */

import { checkFunction, checkText } from './argument_checks.js';
import { encodePayload } from './payload_json.js';
import { awaitable } from './subscription_handle.js';

/** @import { JoinOptions, Membership, MembershipHandle } from './types.js' */
/** @typedef {import('./memberships.js').Memberships} Memberships */
/** @typedef {import('./core.js').Settler} Settler */

/**
 * Become a member of a channel.
 *
 * @param {string} channel @param {unknown} info undefined for none @param {JoinOptions} options
 * @param {object} host
 * @param {(call: (memberships: Memberships, settler: Settler) => void) => Promise<any>} host.ask
 * @param {(error: unknown) => void} host.threw
 * @param {(error: Error) => void} host.reportError
 * @returns {MembershipHandle}
 */
export function join(channel, info, { signal, onEnd }, { ask, threw, reportError }) {
  let told = false;
  let joined = false;
  /** @type {import('./memberships.js').Holder} */
  const holder = { channel: `${channel}`, info: undefined, target: { ended } };
  const abort = () => void leave();
  /** @type {Membership} */
  const membership = {
    channel: holder.channel,
    update: async (next) => {
      const json = encodeInfo(next);
      await ask((memberships, settler) => memberships.update(holder, json, settler));
    },
    leave,
  };
  const ready = begin().then(() => {
    joined = true;
    return membership;
  });
  // The application need not await it.
  ready.catch((error) => {
    if (!told && !onEnd && error.code !== 'closed' && !signal?.aborted) reportError(error);
  });

  async function begin() {
    checkText('channel', channel);
    checkFunction('onEnd', onEnd);
    holder.info = encodeInfo(info);
    if (signal?.aborted) throw signal.reason;
    signal?.addEventListener('abort', abort);
    try {
      await ask((memberships, settler) => memberships.join(holder, settler));
    } catch (error) {
      throw signal?.aborted ? signal.reason : error;
    }
  }

  async function leave() {
    signal?.removeEventListener('abort', abort);
    await ask((memberships, settler) => memberships.leave(holder, settler));
  }

  /** @param {Error} why */
  function ended(why) {
    signal?.removeEventListener('abort', abort);
    if (!onEnd) {
      if (joined) reportError(why);
      return;
    }
    try {
      onEnd(why);
    } catch (error) {
      threw(error);
    }
  }

  return awaitable(membership, () => {
    told = true;
    return ready;
  });
}

/** @param {unknown} info */
function encodeInfo(info) {
  return info === undefined ? undefined : encodePayload(info);
}
