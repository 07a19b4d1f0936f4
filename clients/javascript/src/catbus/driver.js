/**
 * What carries out the effects of a core: transports, the timer, the token function, promises and callbacks.
 *
 * @module
 */

import { DisconnectedError, asError } from './errors.js';
import { addListener, removeListener } from './persist.js';
import { openWebSocket } from './websocket.js';
import { findHashes, openWebTransport } from './webtransport.js';

/** @typedef {import('./core.js').Core} Core */
/** @typedef {import('./core.js').Effect} Effect */
/** @typedef {import('./link.js').Link} Link */
/** @typedef {import('./webtransport.js').Transport} Transport */

/** The longest time that `setTimeout` knows. */
const FOREVER = 2 ** 31 - 1;
/** How many objects of the full size may go into one WebSocket message: the broker takes 16. */
const TOGETHER = 4;

export class Driver {
  #core;
  #options;
  #emit;
  #busy = false;
  /** @type {Map<Link, {controller: AbortController, transport?: Transport}>} */
  #transports = new Map();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  #timerAt = Infinity;
  #wake = () => {
    if (globalThis.document?.visibilityState !== 'hidden') this.do((core) => core.wake());
  };

  /**
   * @param {Core} core @param {import('./types.js').Options} options
   * @param {(event: string, value: any) => void} emit
   */
  constructor(core, options, emit) {
    this.#core = core;
    this.#options = options;
    this.#emit = emit;
  }

  /** Do something with the core, and carry out what follows from it. @template T @param {(core: Core) => T} call @returns {T} */
  do(call) {
    this.#core.advance(performance.now(), Date.now());
    const result = call(this.#core);
    this.#carryOut();
    return result;
  }

  /** Do something that is settled later. @template T @param {(core: Core, settler: import('./core.js').Settler) => void} call @returns {Promise<T>} */
  ask(call) {
    return new Promise((resolve, reject) => this.do((core) => call(core, { resolve, reject })));
  }

  /** Hear of the network and of the page. */
  listen() {
    for (const type of ['online', 'visibilitychange', 'resume', 'pageshow']) addListener(type, this.#wake);
  }

  deafen() {
    for (const type of ['online', 'visibilitychange', 'resume', 'pageshow']) removeListener(type, this.#wake);
  }

  #carryOut() {
    // A callback may call again: what follows from that comes behind what is to be done already.
    if (this.#busy) return;
    this.#busy = true;
    const { effects } = this.#core;
    for (let at = 0; at < effects.length; at++) this.#perform(effects[at]);
    effects.length = 0;
    this.#busy = false;
    this.#setTimer();
  }

  /** @param {Effect} effect */
  #perform(effect) {
    switch (effect.type) {
      case 'tell':
        return effect.target[effect.what](effect.value);
      case 'flush':
        return queueMicrotask(() => this.#flush(effect.link));
      case 'settle':
        return effect.error ? effect.settler.reject(effect.error) : effect.settler.resolve(effect.value);
      case 'emit':
        return this.#emit(effect.event, effect.value);
      case 'open':
        return void this.#open(effect.link);
      case 'token':
        return this.#getToken(effect.link);
      case 'close':
        return this.#close(effect.link, effect.code);
    }
  }

  #setTimer() {
    const { deadline = Infinity } = this.#core;
    // One that comes too early looks again, so only a sooner one needs another.
    if (deadline >= this.#timerAt) return;
    clearTimeout(this.#timer);
    this.#timerAt = deadline;
    const fire = () => {
      this.#timerAt = Infinity;
      this.do(() => {});
    };
    this.#timer = setTimeout(fire, Math.min(FOREVER, Math.max(0, Math.ceil(deadline - performance.now()))));
  }

  /** End the timer where nothing needs it: it would keep a process alive. */
  rest() {
    if (this.#core.deadline !== undefined) return;
    clearTimeout(this.#timer);
    this.#timerAt = Infinity;
  }

  /** @param {Link} link */
  async #open(link) {
    const controller = new AbortController();
    /** @type {{controller: AbortController, transport?: Transport}} */
    const known = { controller };
    this.#transports.set(link, known);
    const { signal } = controller;
    try {
      const constructor = /** @type {any} */ (constructorFor(link.kind, this.#options));
      const transport =
        link.kind === 'websocket'
          ? await openWebSocket(link.url, constructor, signal)
          : await openWebTransport(link.url, constructor, this.#options.serverCertificateHashes ?? (await findHashes(link.url, this.#options, signal)), signal);
      if (signal.aborted) return transport.close(0, '');
      known.transport = transport;
      transport.start({
        onText: (text, stream) => this.do((core) => core.received(link, text, stream)),
        onStreamEnd: (stream) => link.forget(stream),
        onDatagram: (object) => this.do((core) => core.receivedDatagram(link, object)),
        onClose: (code, reason) => {
          this.#transports.delete(link);
          this.do((core) => core.closed(link, code, reason));
        },
      });
      this.do((core) => core.opened(link));
    } catch (error) {
      this.#transports.delete(link);
      if (!signal.aborted) this.do((core) => core.failed(link, asError(error)));
    }
  }

  /** @param {Link} link */
  #getToken(link) {
    const { token } = this.#options;
    if (typeof token === 'string') return this.#core.gotToken(link, token);
    const got = async () => {
      const value = await token();
      if (typeof value !== 'string') throw new TypeError(`the token function returned ${value === null ? 'null' : typeof value}, not a string`);
      return value;
    };
    got().then(
      (value) => this.do((core) => core.gotToken(link, value)),
      (error) => this.do((core) => core.noToken(link, error)),
    );
  }

  /** @param {Link} link */
  #flush(link) {
    const transport = this.#transports.get(link)?.transport;
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
  #close(link, code) {
    this.#flush(link);
    const known = this.#transports.get(link);
    this.#transports.delete(link);
    known?.controller.abort(new DisconnectedError('the connection is not needed'));
    known?.transport?.close(code, '');
  }
}

/** @param {string} kind @param {import('./types.js').Options} options */
export function constructorFor(kind, { WebSocket, WebTransport }) {
  return kind === 'websocket' ? WebSocket ?? globalThis.WebSocket : WebTransport ?? globalThis.WebTransport;
}
