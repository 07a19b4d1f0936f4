/**
 * The driver of a core: carries out its effects with transports, a timer, the token function, promises and callbacks.
 *
 * @module
 */

import { wrong } from './argument_checks.js';
import { asError } from './errors.js';
import { listenFor } from './persisted_cursor.js';
import { openWebSocket } from './websocket_transport.js';
import { openWebTransport } from './webtransport_transport.js';

/** @typedef {import('./core.js').Core} Core */
/** @typedef {import('./connection.js').Connection} Connection */
/** @typedef {import('./webtransport_transport.js').Transport} Transport */

/** The longest delay that `setTimeout` supports. */
const MAX_TIMEOUT = 2 ** 31 - 1;
/** Objects of the full size in one WebSocket message. The broker accepts 16. */
const MAX_OBJECTS_PER_MESSAGE = 4;

/**
 * Drive a core. `perform` calls it and carries out the effects; `ask` also returns a promise for the settlement.
 * `listen` handles events of the network and of the page, until `leave`.
 *
 * @param {Core} core @param {import('./types.js').Options} options
 * @param {(event: string, value: any) => void} emit
 */
export function drive(core, options, emit) {
  /** @type {Map<Connection, {controller: AbortController, transport?: Transport}>} */
  const transports = new Map();
  let busy = false;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;
  let timerAt = Infinity;
  let deafen = () => {};

  /** How each effect is carried out. @type {Record<import('./core.js').Effect[0], (...details: any[]) => void>} */
  const carryOut = {
    open,
    token: getToken,
    flush: (connection) => queueMicrotask(() => flush(connection)),
    close,
    settle: (settler, error, value) => settler(error, value),
    notify: (target, what, value) => target[what](value),
    emit,
  };

  /** @template T @param {(core: Core) => T} call @returns {T} */
  function perform(call) {
    core.advance(performance.now(), Date.now());
    const result = call(core);
    // A callback may call the core again: those effects come after the present ones.
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
    // An unused timer would keep a Node process alive.
    if (core.timers.next === undefined) {
      clearTimeout(timer);
      timerAt = Infinity;
    }
  }

  function setTimer() {
    const { next = Infinity } = core.timers;
    // A timer that fires early is set again, so only an earlier deadline needs a new one.
    if (next >= timerAt) return;
    clearTimeout(timer);
    timerAt = next;
    const fire = () => {
      timerAt = Infinity;
      perform(() => {});
    };
    timer = setTimeout(fire, Math.min(MAX_TIMEOUT, Math.max(0, Math.ceil(next - performance.now()))));
  }

  /** @param {Connection} connection */
  async function open(connection) {
    const controller = new AbortController();
    /** @type {{controller: AbortController, transport?: Transport}} */
    const known = { controller };
    transports.set(connection, known);
    const { signal } = controller;
    try {
      const begin = connection.kind === 'websocket' ? openWebSocket : openWebTransport;
      const transport = await begin(connection.url, constructorFor(connection.kind, options), signal, options);
      if (signal.aborted) return transport.close(0, '');
      known.transport = transport;
      transport.start({
        onText: (text, stream) => perform(() => core.received(connection, text, stream)),
        onStreamEnd: (stream) => connection.forget(stream),
        onDatagram: (object) => perform(() => core.receivedDatagram(connection, object)),
        onClose: (code, reason) => {
          transports.delete(connection);
          perform(() => core.closed(connection, code, reason));
        },
      });
      perform(() => core.opened(connection));
    } catch (error) {
      transports.delete(connection);
      if (!signal.aborted) perform(() => core.failed(connection, asError(error)));
    }
  }

  /** @param {Connection} connection */
  function getToken(connection) {
    const { token } = options;
    if (typeof token === 'string') return core.gotToken(connection, token);
    const got = async () => {
      const value = await token();
      if (typeof value !== 'string') throw wrong('token', 'a function that returns a string', value);
      return value;
    };
    got().then(
      (value) => perform(() => core.gotToken(connection, value)),
      (error) => perform(() => core.noToken(connection, error)),
    );
  }

  /** @param {Connection} connection */
  function flush(connection) {
    const transport = transports.get(connection)?.transport;
    const texts = connection.take();
    if (!transport) return;
    const most = MAX_OBJECTS_PER_MESSAGE * (connection.limits.message_size ?? 65_536);
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

  /** @param {Connection} connection @param {number} code */
  function close(connection, code) {
    flush(connection);
    const known = transports.get(connection);
    transports.delete(connection);
    known?.controller.abort();
    known?.transport?.close(code, '');
  }

  return { perform, ask, listen, leave };
}

/** @param {string} kind @param {import('./types.js').Options} options @returns {any} */
export function constructorFor(kind, { WebSocket, WebTransport }) {
  return kind === 'websocket' ? WebSocket ?? globalThis.WebSocket : WebTransport ?? globalThis.WebTransport;
}
