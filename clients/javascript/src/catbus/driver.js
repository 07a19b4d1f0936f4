/**
 * What carries out the effects of a core: transports, the timer, the token function, promises and callbacks.
 *
 * @module
 */

import { wrong } from './arguments.js';
import { asError } from './errors.js';
import { listenFor } from './persist.js';
import { openWebSocket } from './websocket.js';
import { openWebTransport } from './webtransport.js';

/** @typedef {import('./core.js').Core} Core */
/** @typedef {import('./link.js').Link} Link */
/** @typedef {import('./webtransport.js').Transport} Transport */

/** The longest time that `setTimeout` knows. */
const FOREVER = 2 ** 31 - 1;
/** How many objects of the full size may go into one WebSocket message: the broker takes 16. */
const TOGETHER = 4;

/**
 * Drive a core: `perform` has something done with it and carries out what follows from that; with `ask`, what is settled
 * later. `listen` hears of the network and of the page, until `leave`.
 *
 * @param {Core} core @param {import('./types.js').Options} options
 * @param {(event: string, value: any) => void} emit
 */
export function drive(core, options, emit) {
  /** @type {Map<Link, {controller: AbortController, transport?: Transport}>} */
  const transports = new Map();
  let busy = false;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;
  let timerAt = Infinity;
  let deafen = () => {};

  /** How an effect is carried out. @type {Record<import('./core.js').Effect[0], (...details: any[]) => void>} */
  const carryOut = {
    open,
    token: getToken,
    flush: (link) => queueMicrotask(() => flush(link)),
    close,
    settle: (settler, error, value) => settler(error, value),
    tell: (target, what, value) => target[what](value),
    emit,
  };

  /** @template T @param {(core: Core) => T} call @returns {T} */
  function perform(call) {
    core.advance(performance.now(), Date.now());
    const result = call(core);
    // A callback may call again: what follows from that comes behind what is to be done already.
    if (!busy) {
      busy = true;
      for (const [what, ...details] of core.effects) carryOut[what](...details);
      core.effects.length = 0;
      busy = false;
      setTimer();
    }
    return result;
  }

  /** @template T @param {(core: Core, settler: import('./core.js').Settler) => void} call @returns {Promise<T>} */
  function ask(call) {
    return new Promise((resolve, reject) => perform(() => call(core, (error, value) => (error ? reject(error) : resolve(value)))));
  }

  function listen() {
    deafen = listenFor(['online', 'visibilitychange', 'resume', 'pageshow'], () => {
      if (globalThis.document?.visibilityState !== 'hidden') perform(() => core.wake());
    });
  }

  function leave() {
    deafen();
    perform(() => core.disconnect());
    // Where nothing needs the timer it ends: it would keep a process alive.
    if (core.timers.next === undefined) {
      clearTimeout(timer);
      timerAt = Infinity;
    }
  }

  function setTimer() {
    const { next = Infinity } = core.timers;
    // One that comes too early looks again, so only a sooner one needs another.
    if (next >= timerAt) return;
    clearTimeout(timer);
    timerAt = next;
    const fire = () => {
      timerAt = Infinity;
      perform(() => {});
    };
    timer = setTimeout(fire, Math.min(FOREVER, Math.max(0, Math.ceil(next - performance.now()))));
  }

  /** @param {Link} link */
  async function open(link) {
    const controller = new AbortController();
    /** @type {{controller: AbortController, transport?: Transport}} */
    const known = { controller };
    transports.set(link, known);
    const { signal } = controller;
    try {
      const begin = link.kind === 'websocket' ? openWebSocket : openWebTransport;
      const transport = await begin(link.url, constructorFor(link.kind, options), signal, options);
      if (signal.aborted) return transport.close(0, '');
      known.transport = transport;
      transport.start({
        onText: (text, stream) => perform(() => core.received(link, text, stream)),
        onStreamEnd: (stream) => link.forget(stream),
        onDatagram: (object) => perform(() => core.receivedDatagram(link, object)),
        onClose: (code, reason) => {
          transports.delete(link);
          perform(() => core.closed(link, code, reason));
        },
      });
      perform(() => core.opened(link));
    } catch (error) {
      transports.delete(link);
      if (!signal.aborted) perform(() => core.failed(link, asError(error)));
    }
  }

  /** @param {Link} link */
  function getToken(link) {
    const { token } = options;
    if (typeof token === 'string') return core.gotToken(link, token);
    const got = async () => {
      const value = await token();
      if (typeof value !== 'string') throw wrong('token', 'a function that returns a string', value);
      return value;
    };
    got().then(
      (value) => perform(() => core.gotToken(link, value)),
      (error) => perform(() => core.noToken(link, error)),
    );
  }

  /** @param {Link} link */
  function flush(link) {
    const transport = transports.get(link)?.transport;
    const texts = link.take();
    if (!transport) return;
    const most = TOGETHER * (link.limits.message_size ?? 65_536);
    let waiting = '';
    for (const text of texts) {
      if (waiting && waiting.length + text.length > most) {
        transport.send(waiting);
        waiting = '';
      }
      waiting += text;
    }
    if (waiting) transport.send(waiting);
  }

  /** @param {Link} link @param {number} code */
  function close(link, code) {
    flush(link);
    const known = transports.get(link);
    transports.delete(link);
    known?.controller.abort();
    known?.transport?.close(code, '');
  }

  return { perform, ask, listen, leave };
}

/** @param {string} kind @param {import('./types.js').Options} options @returns {any} */
export function constructorFor(kind, { WebSocket, WebTransport }) {
  return kind === 'websocket' ? WebSocket ?? globalThis.WebSocket : WebTransport ?? globalThis.WebTransport;
}
