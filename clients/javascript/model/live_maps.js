/** Live maps of the client, each compared with what it should show after every notification. */

import assert from 'node:assert/strict';

export function makeModelMaps({ LiveMaps, PresenceFeed, PresenceState, RetainedFeed, RetainedState }, world) {
  const { log } = world;
  const host = {
    perform: (call) => world.do((core) => call(core.subscriptions)),
    threw: (error) => {
      throw error;
    },
  };
  /** The positions of snapshots, by their messages. */
  const positions = new WeakMap();
  const maps = new Map();
  let turn = 0;

  class Feed extends RetainedFeed {
    receive(object) {
      const notifications = super.receive(object);
      for (const [, messages] of notifications) positions.set(messages, { seq: this.cursor, epoch: this.epoch });
      return notifications;
    }
  }

  class Retained extends RetainedState {
    snapshot(messages) {
      super.snapshot(messages);
      this.position = positions.get(messages);
      this.compare('a snapshot');
    }

    message(what) {
      super.message(what);
      this.position = { seq: what.message.seq, epoch: what.epoch };
      this.compare('a message');
    }

    compare(what) {
      const { seq, epoch } = this.position;
      compare(this, log.retained(this.feed.subscription.pattern, seq, epoch), `${what} at ${seq} of ${epoch}`);
    }

    ended(why) {
      super.ended(why);
      checkEnd(this, why);
    }
  }

  class Present extends PresenceState {
    ended(why) {
      super.ended(why);
      checkEnd(this, why);
    }
  }

  function checkEnd({ feed }, why) {
    const mine = why === undefined || (why.code === 'unauthorized' && feed.owner !== world.core.supervisor.identity);
    assert.ok(mine, `a live map has ended: ${why?.message}`);
  }

  function compare(state, wanted, when) {
    const shown = new Map([...state.entries].map(([channel, { payload, seq, at }]) => [channel, { payload, seq, at }]));
    assert.deepEqual(shown, wanted, `a map after ${when}`);
  }

  const kinds = {
    retained: new LiveMaps(Retained, Feed, host),
    presence: new LiveMaps(Present, PresenceFeed, host),
  };

  /** What a listener is told is a difference, and all of them together give the present state. */
  const listeners = {
    retained: (mirror) => ({ channel, message, previous }) => {
      assert.deepEqual(previous, mirror.get(channel));
      assert.notDeepEqual(message, previous);
      if (message) mirror.set(channel, message);
      else mirror.delete(channel);
    },
    presence: (mirror) => ({ action, channel, member }) => {
      const name = `${channel} ${member.clientId}`;
      assert.equal(mirror.has(name), action !== 'join');
      if (action === 'update') assert.notDeepEqual(mirror.get(name), member);
      if (action === 'leave') mirror.delete(name);
      else mirror.set(name, member);
    },
  };

  return {
    get open() {
      return [...maps.values()].filter(({ map, state }) => state.maps.has(map));
    },

    add(kind, pattern) {
      if (this.open.length >= 3) return;
      const controller = new AbortController();
      kinds[kind].open(pattern, { signal: controller.signal }).catch(() => {});
      const state = kinds[kind].stateOf(pattern);
      const map = [...state.maps].at(-1);
      const mirror = new Map(kind === 'retained' ? state.entries : [...state.entries.values()].flat().map((member) => [`${member.channel} ${member.clientId}`, member]));
      map.onChange(listeners[kind](mirror));
      maps.set(++turn, { kind, pattern, state, map, mirror, controller });
    },

    close({ controller }) {
      controller.abort();
    },

    openEnds() {
      return this.open.filter((each) => !this.isComplete(each)).map(({ kind, pattern }) => `a map of ${kind} of ${pattern}`);
    },

    isComplete({ kind, pattern, state }) {
      const { feed } = state;
      if (!state.complete || feed.phase !== 'active' || !feed.subscription.incoming) return false;
      if (kind === 'presence') return JSON.stringify([...state.entries.values()].flat().map(({ channel, clientId, sessions, info }) => [channel, clientId, sessions, info]).sort())
        === JSON.stringify(world.presence.members(pattern).map(({ channel, client_id: clientId, sessions, info }) => [channel, clientId, sessions, info]).sort());
      const [last = 0] = log.after(pattern, 0).slice(-1);
      const lost = feed.epoch !== log.epoch && feed.cursor > log.common(feed.epoch, log.epoch);
      return feed.cursor >= last && !lost && feed.subscription.live;
    },

    finish() {
      for (const { kind, pattern, state, mirror } of this.open) {
        if (kind === 'retained') {
          compare(state, log.retained(pattern, Infinity), 'the end');
          assert.deepEqual(mirror, state.entries);
        } else assert.deepEqual(new Set(mirror.values()), new Set([...state.entries.values()].flat()));
        assert.equal(state.feed.owner, world.clientId, 'a map belongs to somebody else');
      }
    },
  };
}
