import { createHmac } from 'node:crypto';
import { connect, createServer } from 'node:net';
import { after } from 'node:test';

import WebSocket from 'ws';

import { CatbusClient } from '../src/catbus.js';

/** The broker under test. `tests/javascript` sets its URL and its secret. */
export const URL_OF_BROKER = process.env.CATBUS_URL;
export const skip = URL_OF_BROKER ? false : 'CATBUS_URL names no broker: python -m pytest tests/javascript';

const EVERYTHING = ['read', 'write'].map((type) => ({ grant_type: type, pattern: '*' }));

/** A token in the format of section 13 of the specification. */
export function sign({ clientId = 'node', grants = EVERYTHING, ...claims } = {}) {
  const text = Buffer.from(JSON.stringify({ client_id: clientId, grants: { grants }, ...claims })).toString('base64url');
  const mac = createHmac('sha256', process.env.CATBUS_SECRET ?? '').update(text).digest().subarray(0, 16);
  return `sub-${text}.${mac.toString('base64url')}`;
}

/** A client that disconnects at the end of the test. */
export function makeClient(options = {}) {
  const client = new CatbusClient({ url: URL_OF_BROKER, token: sign(), WebSocket, reconnectDelay: 20, ...options });
  after(() => client.disconnect());
  return client;
}

/** A channel that no other test uses. */
let channels = 0;
export const channel = () => `node.test-${process.pid}-${++channels}`;

/** A TCP proxy to the broker, with the URL `url`. Its connections can be cut. */
export async function openProxy() {
  const { hostname, port } = new URL(URL_OF_BROKER);
  const sockets = new Set();
  const proxy = {
    url: '',
    accepted: 0,
    refusing: false,
    cut: () => sockets.forEach((socket) => socket.destroy()),
    /** Stop forwarding on open connections without closing them. */
    pause: () => sockets.forEach((socket) => (socket.unpipe(), socket.pause())),
  };
  const server = createServer((inside) => {
    proxy.accepted++;
    if (proxy.refusing) return inside.destroy();
    const outside = connect(Number(port), hostname);
    for (const socket of [inside, outside]) {
      sockets.add(socket);
      socket.on('error', () => {});
      socket.on('close', () => (inside.destroy(), outside.destroy(), sockets.delete(socket)));
    }
    inside.pipe(outside).pipe(inside);
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  after(() => (proxy.cut(), server.close()));
  proxy.url = `ws://127.0.0.1:${server.address().port}/ws`;
  return proxy;
}

/** Wait for an event of a client. */
export const next = (client, type, wanted = () => true) =>
  new Promise((resolve) => {
    const stop = client.on(type, (value) => wanted(value) && (stop(), resolve(value)));
  });
