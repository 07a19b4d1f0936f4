// A browser's WebSocket, for a page: each command of `libraries.py` is a function of `window.puppet`.

let socket, heard, waiting;

const tell = (told, what) => {
    told.push(what);
    if (told === heard) waiting?.();
};

window.puppet = {
    connect: ({ url, subprotocols }) => new Promise((resolve, reject) => {
        const made = new WebSocket(url, subprotocols);
        const told = heard = [];
        socket = made;
        made.onopen = () => resolve({ subprotocol: made.protocol || null, extensions: made.extensions.split(',').filter(Boolean) });
        made.onmessage = ({ data }) => tell(told, { text: data });
        made.onclose = ({ code, reason }) => {
            tell(told, { closed: [code, reason] });
            reject(new Error(`closed with ${code}`));
        };
    }),
    send: async ({ data, binary }) => socket.send(binary ? new TextEncoder().encode(data) : data),
    hear: async () => {
        while (!heard.length) await new Promise((resolve) => { waiting = resolve; });
        return heard.shift();
    },
    close: ({ code, reason }) => new Promise((resolve) => {
        socket.onclose = (event) => resolve({ closed: [event.code, event.reason] });
        socket.close(code, reason);
    }),
};
