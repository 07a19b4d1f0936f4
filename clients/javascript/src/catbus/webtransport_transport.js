/**
 * WebTransport as a transport, and the hash of a self-signed certificate of the broker.
 *
 * @module
 */

import { DisconnectedError } from './errors.js';
import { addressesOf, isLoopback } from './broker_addresses.js';

/**
 * The callbacks of a transport. `stream` identifies a stream of the broker, and is undefined for the main stream.
 *
 * @typedef {object} Receiver
 * @property {(text: string, stream?: unknown) => void} onText
 * @property {(stream: unknown) => void} onStreamEnd
 * @property {(object: any) => void} onDatagram
 * @property {(code: number, reason: string) => void} onClose
 *
 * @typedef {object} Transport
 * @property {(receiver: Receiver) => void} start
 * @property {(text: string) => void} send
 * @property {(code: number, reason: string) => void} close
 */

const encoder = new TextEncoder();
/** The hash that was found last, by URL: that broker may be gone at the next attempt. @type {Map<string, any[]>} */
const found = new Map();

/**
 * @param {string} url @param {new (url: string, options?: any) => any} constructor
 * @param {AbortSignal} signal @param {import('./types.js').Options} options
 * @returns {Promise<Transport>}
 */
export async function openWebTransport(url, constructor, signal, options) {
  const hashes = options.serverCertificateHashes ?? (await findHashes(url, options, signal));
  const session = new constructor(url, hashes ? { serverCertificateHashes: hashes } : {});
  const closed = session.closed.then(
    (/** @type {any} */ { closeCode = 0, reason = '' }) => ({ code: closeCode, reason }),
    (/** @type {any} */ error) => ({ code: 1006, reason: `${error?.message ?? error}` }),
  );
  const abort = () => session.close();
  signal.addEventListener('abort', abort, { once: true });
  try {
    await session.ready;
    const main = await session.createBidirectionalStream();
    signal.throwIfAborted();
    const writer = main.writable.getWriter();
    return {
      start({ onText, onStreamEnd, onDatagram, onClose }) {
        // Each of these ends with the session, which `closed` reports.
        readText(main.readable, (text) => onText(text)).catch(ignore);
        read(session.incomingUnidirectionalStreams, (readable) => {
          readText(readable, (text) => onText(text, readable))
            .catch(ignore)
            .finally(() => onStreamEnd(readable));
        }).catch(ignore);
        const decoder = new TextDecoder();
        read(session.datagrams.readable, (data) => {
          try {
            onDatagram(JSON.parse(decoder.decode(data)));
          } catch {
            // An invalid datagram does not affect the others.
          }
        }).catch(ignore);
        closed.then((/** @type {any} */ { code, reason }) => onClose(code, reason));
      },
      send: (text) => void writer.write(encoder.encode(text)).catch(ignore),
      close: (closeCode, reason) => session.close({ closeCode, reason }),
    };
  } catch (error) {
    if (signal.aborted) throw signal.reason;
    throw new DisconnectedError(`cannot connect to ${url}: ${error instanceof Error ? error.message : error}`);
  } finally {
    signal.removeEventListener('abort', abort);
  }
}

/** @template T @param {ReadableStream<T>} readable @param {(value: T) => void} take */
async function read(readable, take) {
  const reader = readable.getReader();
  for (let next = await reader.read(); !next.done; next = await reader.read()) take(next.value);
}

/** @param {ReadableStream<Uint8Array>} readable @param {(text: string) => void} take */
async function readText(readable, take) {
  const decoder = new TextDecoder();
  await read(readable, (data) => take(decoder.decode(data, { stream: true })));
}

/**
 * The hash of the self-signed certificate of the broker, or undefined.
 *
 * @param {string} url @param {{discovery?: string | undefined, fallbackUrl?: string | undefined}} options @param {AbortSignal} signal
 */
async function findHashes(url, { discovery, fallbackUrl }, signal) {
  if (!discovery && !isLoopback(new URL(url).hostname)) return undefined;
  const page = globalThis.location?.origin;
  const origins = [discovery, fallbackUrl?.replace(/^ws/, 'http'), page?.startsWith('http') ? page : undefined];
  for (const origin of origins.flatMap((each) => (each ? addressesOf(each) : []))) {
    try {
      const limit = AbortSignal.any([signal, AbortSignal.timeout(1000)]);
      const answer = await fetch(new URL('/.well-known/catbus', origin), { signal: limit, cache: 'no-store' });
      if (!answer.ok) continue;
      const { certificate_hash: hash } = await answer.json();
      if (!hash) return undefined;
      const hashes = [{ algorithm: 'sha-256', value: Uint8Array.from(atob(hash), (character) => character.charCodeAt(0)) }];
      found.set(url, hashes);
      return hashes;
    } catch {
      signal.throwIfAborted();
    }
  }
  return found.get(url);
}

function ignore() {}
