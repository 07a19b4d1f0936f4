// `ws` for Node, driven as `libraries.py` is: a command in JSON on each line of stdin, an answer on each line of stdout.

import { readFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { once } from 'node:events';
import { createRequire } from 'node:module';

const { WebSocket } = createRequire(process.argv[2])('ws');
let socket, heard, waiting;

const tell = (what) => {
    heard.push(what);
    waiting?.();
};

const commands = {
    async connect({ url, ca, headers, subprotocols }) {
        // Compression is offered unless it is switched off.
        const made = new WebSocket(url, subprotocols, { ca: ca && readFileSync(ca), headers });
        heard = [];
        socket = made;
        const told = heard;
        made.on('message', (data) => told === heard && tell({ text: data.toString() }));
        made.on('close', (code, reason) => told === heard && tell({ closed: [code, reason.toString()] }));
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
    async hear() {
        socket.resume();
        while (!heard.length) await new Promise((resolve) => { waiting = resolve; });
        return heard.shift();
    },
    async close({ code, reason }) {
        socket.close(code, reason);
        const [got, why] = await once(socket, 'close');
        return { closed: [got, why.toString()] };
    },
};

for await (const line of createInterface({ input: process.stdin })) {
    const { do: name, ...fields } = JSON.parse(line);
    let answer;
    try {
        answer = { result: (await commands[name](fields)) ?? null };
    } catch (error) {
        answer = { error: `${error.name}: ${error.message}` };
    }
    process.stdout.write(`${JSON.stringify(answer)}\n`);
}
process.exit();
