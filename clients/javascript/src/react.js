/**
 * The Catbus client for React 18 and 19: a provider and hooks.
 *
 * @module
 */
'use client';

import { createContext, createElement, useCallback, useContext, useEffect, useMemo, useRef, useState, useSyncExternalStore } from 'react';

/**
 * @import { CatbusClient } from './catbus/client.js'
 * @import { ConnectionState, Gap, LiveMapOf, LiveOptions, Member, Message, Published, PublishOptions, RetainedMessage, SubscribeOptions } from './catbus/types.js'
 */

const ClientContext = createContext(/** @type {CatbusClient | undefined} */ (undefined));

/**
 * Gives a client to all components below. It connects when it is mounted and disconnects when it is removed, unless
 * `connect` is false. Another client replaces the one before: use one for each user that signs in.
 *
 * @param {{client: CatbusClient, connect?: boolean | undefined, children?: import('react').ReactNode}} props
 * @returns {import('react').ReactElement}
 */
export function CatbusProvider({ client, connect = true, children }) {
  useEffect(() => {
    if (!connect) return undefined;
    client.connect();
    return () => void client.disconnect();
  }, [client, connect]);
  return createElement(ClientContext.Provider, { value: client }, children);
}

/** The client of the nearest `CatbusProvider`. @returns {CatbusClient} */
export function useCatbus() {
  const client = useContext(ClientContext);
  if (!client) throw new Error('there is no CatbusProvider around this component');
  return client;
}

/** The state of the client; `disconnected` while a page is rendered on a server. @returns {ConnectionState} */
export function useConnectionState() {
  const client = useCatbus();
  const subscribe = useCallback((/** @type {() => void} */ changed) => client.onStateChange(changed), [client]);
  return useSyncExternalStore(subscribe, () => client.connectionState, () => 'disconnected');
}

/**
 * A function to publish with. It stays the same as long as the client.
 *
 * @returns {(channel: string, payload: unknown, options?: PublishOptions) => Promise<Published>}
 */
export function usePublish() {
  const client = useCatbus();
  return useCallback((channel, payload, options) => client.publish(channel, payload, options), [client]);
}

/**
 * The state of a subscription: `live` when it has caught up, `error` when it has ended.
 *
 * @typedef {{live: boolean, error: Error | undefined}} SubscriptionState
 */

/**
 * Subscribe while the component is mounted and `pattern` is one: `null` and `undefined` are none. The newest `handler`
 * is called; a new one does not subscribe again, and neither does another start (`since`, `last`).
 *
 * @template [T=any]
 * @param {string | null | undefined} pattern @param {(message: Message<T>) => unknown} handler
 * @param {Omit<SubscribeOptions, 'signal'>} [options] @returns {SubscriptionState}
 */
export function useSubscription(pattern, handler, options = {}) {
  return useSubscriptionFrom(pattern, handler, options, undefined);
}

/**
 * The same, but subscribes again when `start` changes.
 *
 * @param {string | null | undefined} pattern @param {(message: Message) => unknown} handler
 * @param {Omit<SubscribeOptions, 'signal'>} options @param {unknown} start @returns {SubscriptionState}
 */
function useSubscriptionFrom(pattern, handler, options, start) {
  const client = useCatbus();
  const newest = useRef({ handler, options });
  useEffect(() => {
    newest.current = { handler, options };
  });
  const [state, setState] = useState(/** @type {SubscriptionState & {of?: unknown}} */ ({ live: false, error: undefined }));
  const { persist, stream, datagrams } = options;
  useEffect(() => {
    if (pattern === null || pattern === undefined) return undefined;
    setState({ live: false, error: undefined, of: pattern });
    const subscription = client.subscribe(pattern, (message) => newest.current.handler(message), {
      ...newest.current.options,
      onGap: (gap) => newest.current.options.onGap?.(gap),
      onLive() {
        setState({ live: true, error: undefined, of: pattern });
        newest.current.options.onLive?.();
      },
      onEnd(error) {
        setState({ live: false, error, of: pattern });
        newest.current.options.onEnd?.(error);
      },
    });
    return () => void subscription.close();
  }, [client, pattern, persist, stream, datagrams, start]);
  // The state of another pattern is never shown for this one.
  return state.of === pattern ? { live: state.live, error: state.error } : { live: false, error: undefined };
}

/**
 * The last messages that match, oldest first, and at most `last` (50). `gap` is the last gap between them.
 *
 * @template [T=any]
 * @param {string | null | undefined} pattern @param {{last?: number | undefined}} [options]
 * @returns {SubscriptionState & {messages: Message<T>[], gap: Gap | undefined}}
 */
export function useMessages(pattern, { last = 50 } = {}) {
  const client = useCatbus();
  const [shown, setShown] = useState({ of: /** @type {unknown} */ (undefined), messages: /** @type {Message<T>[]} */ ([]), gap: /** @type {Gap | undefined} */ (undefined) });
  const key = `${last} ${pattern}`;
  const list = useRef(/** @type {{client: unknown, key: string, messages: Message<T>[], gap: Gap | undefined, due: boolean}} */ ({ client, key, messages: [], gap: undefined, due: false }));
  useEffect(() => {
    // Each subscription delivers the history again, so the list starts empty.
    list.current = { client, key, messages: [], gap: undefined, due: false };
    setShown({ of: client, messages: [], gap: undefined });
  }, [client, key]);
  const show = () => {
    const own = list.current;
    if (own.due) return;
    own.due = true;
    // One update for all messages that arrive together.
    queueMicrotask(() => {
      own.due = false;
      if (list.current === own) setShown({ of: client, messages: own.messages, gap: own.gap });
    });
  };
  const state = useSubscriptionFrom(
    pattern,
    (/** @type {Message<T>} */ message) => {
      list.current.messages = [...list.current.messages, message].slice(-last);
      show();
    },
    {
      last,
      onGap(gap) {
        list.current.gap = gap;
        show();
      },
    },
    last,
  );
  const mine = shown.of === client && list.current.key === key;
  return { ...state, messages: mine ? shown.messages : [], gap: mine ? shown.gap : undefined };
}

/**
 * The state of a live map: `ready` when it is complete, `error` when it has ended.
 *
 * @template V
 * @typedef {{entries: ReadonlyMap<string, V>, ready: boolean, error: Error | undefined}} LiveMapState
 */

/** @type {LiveMapState<any>} */
const EMPTY = { entries: new Map(), ready: false, error: undefined };

/**
 * The retained messages that match, by channel. `entries` is another map after each change. Components with the same pattern
 * share one subscription; `null` and `undefined` are none.
 *
 * @template [T=any]
 * @param {string | null | undefined} pattern @returns {LiveMapState<RetainedMessage<T>>}
 */
export function useRetained(pattern) {
  const client = useCatbus();
  return useLiveMap(useMemo(() => storeOf(pattern, (of, options) => client.retained(of, options)), [client, pattern]));
}

/**
 * The members of all channels that match, by channel. `entries` is another map after each change.
 *
 * @template [I=any]
 * @param {string | null | undefined} pattern @returns {LiveMapState<readonly Member<I>[]>}
 */
export function usePresence(pattern) {
  const client = useCatbus();
  return useLiveMap(useMemo(() => storeOf(pattern, (of, options) => client.presence(of, options)), [client, pattern]));
}

/** @param {ReturnType<typeof storeOf>} store @returns {LiveMapState<any>} */
function useLiveMap({ subscribe, get }) {
  return useSyncExternalStore(subscribe, get, () => EMPTY);
}

/**
 * A store of a live map, which is open while the store is subscribed to.
 *
 * @param {string | null | undefined} pattern @param {(pattern: string, options: LiveOptions) => Promise<LiveMapOf<any, any>>} open
 */
function storeOf(pattern, open) {
  let state = EMPTY;

  /** @param {() => void} changed */
  function subscribe(changed) {
    if (pattern === null || pattern === undefined) return () => {};
    const controller = new AbortController();
    const { signal } = controller;
    let due = false;
    if (state.error) state = EMPTY;
    /** @param {LiveMapState<any>} next */
    const show = (next) => {
      if (signal.aborted) return;
      state = next;
      changed();
    };
    const onEnd = (/** @type {Error} */ error) => show({ ...state, ready: false, error });
    open(pattern, { signal, onEnd }).then((map) => {
      const showMap = () => {
        due = false;
        if (!state.error) show({ entries: new Map(map), ready: true, error: undefined });
      };
      map.onChange(() => {
        // One copy for all changes that arrive together.
        if (!due) queueMicrotask(showMap);
        due = true;
      });
      showMap();
    }, onEnd);
    return () => controller.abort();
  }

  return { subscribe, get: () => state };
}
