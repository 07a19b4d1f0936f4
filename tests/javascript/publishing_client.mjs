// The client of test_replicas.py: `node publishing_client.mjs URL`, with TOKEN in the environment. It publishes without
// pause, and receives its own messages. Commands are lines: `dial URL`, `more`, `finish`. Events are lines of JSON.

import { createInterface } from 'node:readline';

import WebSocket from '../../clients/javascript/node_modules/ws/wrapper.mjs';
import { CatbusClient } from '../../clients/javascript/src/catbus.js';

const TASKS = 5;
const MORE = 50;

let [url] = process.argv.slice(2);
class RedirectedWebSocket extends WebSocket {
  constructor() {
    super(url);
  }
}

const report = (object) => console.log(JSON.stringify(object));
const options = { reconnectDelay: 20, pingInterval: 100, pingTimeout: 300, connectTimeout: 1000, maxQueueSize: 1000 };
const client = new CatbusClient({ url, token: process.env.TOKEN, WebSocket: RedirectedWebSocket, ...options });
const received = [];
const acknowledged = [];
let finished = false;
let expected = Infinity;

client.on('state', (state) => report({ state }));
await client.connect();
await client.subscribe('test.*', ({ seq, payload }) => {
  received.push([seq, payload]);
  if (received.length >= expected) {
    expected = Infinity;
    report({ more: received.length });
  }
});

async function publish(task) {
  for (let number = 0; !finished; number++) {
    const payload = `${task}-${number}`;
    const { seq } = await client.publish('test.replicas', payload);
    acknowledged.push([seq, payload]);
  }
}
const publishing = Array.from({ length: TASKS }, (_, task) => publish(task));

for await (const line of createInterface({ input: process.stdin })) {
  const [command, target] = line.split(' ');
  if (command === 'dial') url = target;
  else if (command === 'more') expected = received.length + MORE;
  else {
    finished = true;
    await Promise.all(publishing);
    const last = await client.publish('test.replicas', 'last');
    while (received.at(-1)?.[0] !== last.seq) await client.ping();
    acknowledged.push([last.seq, 'last']);
    report({ received, acknowledged });
    break;
  }
}
await client.disconnect();
process.exit();
