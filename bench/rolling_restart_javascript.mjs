// The client of rolling_restart_javascript.py: `node rolling_restart_javascript.mjs PORT DELAY SUBSCRIPTIONS`, with TOKEN in
// the environment. Its commands are lines: `target PORT`, `play`, `finish`, `end`. After each round it writes a line of JSON.

import { connect, createServer } from 'node:net';
import { createInterface } from 'node:readline';

import WebSocket from '../clients/javascript/node_modules/ws/wrapper.mjs';

const { CatbusClient } = await import(process.env.CATBUS_CLIENT ?? '../clients/javascript/src/catbus.js');
let [target, delay, subscriptions] = process.argv.slice(2).map(Number);

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Forward data after the delay. */
function forward(from, to) {
  from.on('data', (data) => setTimeout(() => to.writable && to.write(data), delay / 2));
  from.on('end', () => setTimeout(() => to.end(), delay / 2));
  from.on('close', () => setTimeout(() => to.destroy(), delay / 2 + 1));
  from.on('error', () => {});
}

const proxy = createServer((inside) => {
  const outside = connect(target, '127.0.0.1');
  forward(inside, outside);
  forward(outside, inside);
});
await new Promise((resolve) => proxy.listen(0, '127.0.0.1', resolve));

const url = `ws://127.0.0.1:${proxy.address().port}/ws`;
const client = new CatbusClient({ url, token: process.env.TOKEN, WebSocket, reconnectDelay: 100, maxQueueSize: 1e6 });
const counted = { round: 0, subscribed: 0, published: 0, moves: 0, reconnects: 0, silent: 0, lost: 0, repeated: 0, failed: 0 };
await client.connect();
client.on('transport', () => counted.moves++);
client.on('state', (state) => void (state === 'reconnecting' && counted.reconnects++));

let finish = () => {};

async function play() {
  const prefix = `round-${process.pid}-${++counted.round}`;
  const channels = new Map();
  let over = false;
  const subscribing = (async () => {
    const all = [];
    for (let n = 0; n < subscriptions; n++) {
      const channel = { name: `${prefix}.${n}`, heard: [], acknowledged: [], last: false };
      const handler = ({ seq, payload }) => {
        channel.heard.push(seq);
        channel.last ||= payload === 'last';
      };
      all.push(
        Promise.resolve(client.subscribe(channel.name, handler)).then((subscription) => {
          counted.subscribed++;
          channels.set(channel, subscription);
        }),
      );
      await pause(6);
    }
    await Promise.all(all);
  })();
  const publish = (channel, payload) => {
    counted.published++;
    return client.publish(channel.name, payload).then(
      ({ seq }) => void channel.acknowledged.push(seq),
      () => void counted.failed++,
    );
  };
  const answers = [];
  const publishing = (async () => {
    while (!over) {
      const there = [...channels.keys()];
      for (let n = 0; n < 3 && there.length; n++) answers.push(publish(there[Math.floor(Math.random() * there.length)], n));
      await pause(5);
    }
  })();
  await new Promise((resolve) => (finish = resolve));
  await subscribing;
  over = true;
  await publishing;
  await Promise.all([...answers, ...[...channels.keys()].map((channel) => publish(channel, 'last'))]);
  const silent = () => [...channels.keys()].filter(({ last }) => !last).length;
  for (const until = Date.now() + 15_000; silent() && Date.now() < until; ) await pause(20);
  counted.silent += silent();
  for (const { heard, acknowledged } of channels.keys()) {
    const once = new Set(heard);
    counted.repeated += heard.length - once.size;
    counted.lost += acknowledged.filter((seq) => !once.has(seq)).length;
  }
  await Promise.all([...channels.values()].map((subscription) => subscription.unsubscribe()));
  console.log(JSON.stringify(counted));
}

for await (const line of createInterface({ input: process.stdin })) {
  const [what, port] = line.split(' ');
  if (what === 'target') target = Number(port);
  else if (what === 'play') play();
  else if (what === 'finish') finish();
  else process.exit();
}
