/**
 * The addresses of a broker, and the order in which they are tried.
 *
 * @module
 */

/** Milliseconds for which the transport that won is tried first. */
const WINNER_MEMORY = 600_000;

/** @typedef {'webtransport' | 'websocket'} Kind */

/** The transport that won, by URL, and how long it is tried first. @type {Map<string, {kind: Kind, until: number}>} */
const winners = new Map();

/** @param {string} url @returns {Kind} */
export function kindOf(url) {
  switch (new URL(url).protocol) {
    case 'https:':
      return 'webtransport';
    case 'ws:':
    case 'wss:':
      return 'websocket';
    default:
      throw new TypeError(`the URL of a broker begins with https://, ws:// or wss://, not ${url}`);
  }
}

/**
 * The addresses to try, the winner of the last time first.
 *
 * @param {string} url @param {string | undefined} fallbackUrl @param {Kind[]} kinds the transports to use
 * @param {number} now @returns {{url: string, kind: Kind}[]}
 */
export function routesTo(url, fallbackUrl, kinds, now) {
  const routes = [url, ...(fallbackUrl ? [fallbackUrl] : [])]
    .filter((each) => kinds.includes(kindOf(each)))
    .flatMap(addressesOf)
    .map((each) => ({ url: each, kind: kindOf(each) }));
  const winner = winners.get(url);
  if (winner && winner.until > now) routes.sort((a, b) => Number(a.kind !== winner.kind) - Number(b.kind !== winner.kind));
  return routes;
}

/** Remember the transport that won. @param {string} url @param {Kind} kind @param {number} now */
export function rememberWinner(url, kind, now) {
  winners.set(url, { kind, until: now + WINNER_MEMORY });
}

/** @param {string} host */
export function isLoopback(host) {
  return host === 'localhost' || host.endsWith('.localhost') || host === '[::1]' || /^127(\.\d+){3}$/.test(host);
}

/**
 * A URL, and for `localhost` also both loopback addresses: the system may know one of them, or a
 * browser try one of them, and the broker listen on the other.
 *
 * @param {string} url @returns {string[]}
 */
export function addressesOf(url) {
  const { hostname } = new URL(url);
  if (hostname !== 'localhost' && !hostname.endsWith('.localhost')) return [url];
  return [url, ...['127.0.0.1', '[::1]'].map((address) => Object.assign(new URL(url), { hostname: address }).href)];
}
