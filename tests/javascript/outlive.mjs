// The client of test_replicas.py: `node outlive.mjs URL`, with TOKEN in the environment. It publishes all the while, and
// hears what it publishes. It is told by lines: `dial URL`, `more`, `finish`; what happens to it are lines of JSON.

import { createInterface } from 'node:readline';

import WebSocket from '../../clients/javascript/node_modules/ws/wrapper.mjs';
import { CatbusClient } from '../../clients/javascript/src/catbus.js';

const TASKS = 5;
const MORE = 50;

let [url] = process.argv.slice(2);
class Dialled extends WebSocket {
  constructor() {
    super(url);
  }
}

const say = (object) => console.log(JSON.stringify(object));
const options = { reconnectDelay: 20, pingInterval: 100, pingTimeout: 300, connectTimeout: 1000, maxQueueSize: 1000 };
const client = new CatbusClient({ url, token: process.env.TOKEN, WebSocket: Dialled, ...options });
const heard = [];
const acknowledged = [];
let over = false;
let wanted = Infinity;

client.on('state', (state) => say({ state }));
await client.connect();
await client.subscribe('test.*', ({ seq, payload }) => {
  heard.push([seq, payload]);
  if (heard.length >= wanted) {
    wanted = Infinity;
    say({ more: heard.length });
  }
});

async function publish(task) {
  for (let number = 0; !over; number++) {
    const payload = `${task}-${number}`;
    const { seq } = await client.publish('test.outlive', payload);
    acknowledged.push([seq, payload]);
  }
}
const publishing = Array.from({ length: TASKS }, (_, task) => publish(task));

for await (const line of createInterface({ input: process.stdin })) {
  const [what, target] = line.split(' ');
  if (what === 'dial') url = target;
  else if (what === 'more') wanted = heard.length + MORE;
  else {
    over = true;
    await Promise.all(publishing);
    const last = await client.publish('test.outlive', 'last');
    while (heard.at(-1)?.[0] !== last.seq) await client.ping();
    acknowledged.push([last.seq, 'last']);
    say({ heard, acknowledged });
    break;
  }
}
await client.disconnect();
process.exit();
