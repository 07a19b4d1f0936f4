/**
 * WebSocket as a transport.
 *
 * @module
 */

import { DisconnectedError } from './errors.js';

/**
 * @param {string} url @param {new (url: string) => any} constructor @param {AbortSignal} signal
 * @returns {Promise<import('./webtransport_transport.js').Transport>}
 */
export function openWebSocket(url, constructor, signal) {
  return new Promise((resolve, reject) => {
    const socket = new constructor(url);
    const abort = () => {
      socket.close();
      reject(signal.reason);
    };
    signal.addEventListener('abort', abort, { once: true });
    socket.onerror = () => {};
    socket.onclose = () => reject(new DisconnectedError(`cannot connect to ${url}`));
    socket.onopen = () => {
      signal.removeEventListener('abort', abort);
      resolve({
        start({ onText, onClose }) {
          socket.onmessage = (/** @type {any} */ event) => onText(event.data);
          socket.onclose = (/** @type {any} */ event) => onClose(event.code, event.reason);
        },
        send(text) {
          // While it closes, the package `ws` throws; lost publishes are uncertain until the next connection.
          if (socket.readyState === undefined || socket.readyState === 1) socket.send(text);
        },
        // A browser accepts only 1000 and 3000 to 4999.
        close: (code, reason) => socket.close(code === 0 ? 1000 : code, reason),
      });
    };
  });
}
