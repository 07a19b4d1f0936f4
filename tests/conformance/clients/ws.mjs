// A client that uses `ws` for Node. Like `libraries.py`, it reads commands in JSON from stdin and writes replies to stdout.

import { readFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { once } from 'node:events';
import { createRequire } from 'node:module';

const { WebSocket } = createRequire(process.argv[2])('ws');
let socket, received, wake;

const record = (item) => {
    received.push(item);
    wake?.();
};

const commands = {
    async connect({ url, ca, headers, subprotocols }) {
        // `ws` offers compression unless it is disabled.
        const made = new WebSocket(url, subprotocols, { ca: ca && readFileSync(ca), headers });
        received = [];
        socket = made;
        const queue = received;
        made.on('message', (data) => queue === received && record({ text: data.toString() }));
        made.on('close', (code, reason) => queue === received && record({ closed: [code, reason.toString()] }));
        await once(made, 'open');
        return { subprotocol: made.protocol || null, extensions: Object.keys(made._extensions ?? {}) };
    },
    send: async ({ data, binary }) => socket.send(binary ? Buffer.from(data) : data),
    fragments: async ({ parts }) => parts.forEach((part, n) => socket.send(part, { fin: n === parts.length - 1 })),
    async ping() {
        socket.ping('here');
        await once(socket, 'pong');
    },
    pause: async () => socket.pause(),
    async receive() {
        socket.resume();
        while (!received.length) await new Promise((resolve) => { wake = resolve; });
        return received.shift();
    },
    async close({ code, reason }) {
        socket.close(code, reason);
        const [returned, text] = await once(socket, 'close');
        return { closed: [returned, text.toString()] };
    },
};

for await (const line of createInterface({ input: process.stdin })) {
    const { do: name, ...fields } = JSON.parse(line);
    let reply;
    try {
        reply = { result: (await commands[name](fields)) ?? null };
    } catch (error) {
        reply = { error: `${error.name}: ${error.message}` };
    }
    process.stdout.write(`${JSON.stringify(reply)}\n`);
}
process.exit();
