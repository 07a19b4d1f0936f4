// The WebSocket of a browser. Each command of `libraries.py` is a function of `window.commands`.

let socket, received, wake;

const record = (queue, item) => {
    queue.push(item);
    if (queue === received) wake?.();
};

window.commands = {
    connect: ({ url, subprotocols }) => new Promise((resolve, reject) => {
        const made = new WebSocket(url, subprotocols);
        const queue = received = [];
        socket = made;
        made.onopen = () => resolve({ subprotocol: made.protocol || null, extensions: made.extensions.split(',').filter(Boolean) });
        made.onmessage = ({ data }) => record(queue, { text: data });
        made.onclose = ({ code, reason }) => {
            record(queue, { closed: [code, reason] });
            reject(new Error(`closed with ${code}`));
        };
    }),
    send: async ({ data, binary }) => socket.send(binary ? new TextEncoder().encode(data) : data),
    receive: async () => {
        while (!received.length) await new Promise((resolve) => { wake = resolve; });
        return received.shift();
    },
    close: ({ code, reason }) => new Promise((resolve) => {
        socket.onclose = (event) => resolve({ closed: [event.code, event.reason] });
        socket.close(code, reason);
    }),
};
