// Connects to the broker that served this page, and stores the session in `bus` for later scripts.
// `args`: a token, and whether to wait for the replies.

const found = await (await fetch('/.well-known/catbus')).json();
const value = Uint8Array.from(atob(found.certificate_hash), (c) => c.charCodeAt(0));
const session = new WebTransport(found.webtransport, {serverCertificateHashes: [{algorithm: 'sha-256', value}]});
await session.ready;
const stream = await session.createBidirectionalStream();
const writer = stream.writable.getWriter();
const encoder = new TextEncoder();

const bus = window.bus = {
    session,
    writer,
    lines: [],       // objects that arrived on the stream of the session
    streams: {},     // objects that arrived on streams of subscriptions, by pattern
    datagrams: [],
    cancelling: false, // whether to cancel the reader of each new stream of a subscription, after its first bytes
    send: (...messages) => writer.write(encoder.encode(messages.map((m) => JSON.stringify(m)).join(''))),
    waitFor: async (condition) => {
        while (!condition()) await new Promise((resolve) => setTimeout(resolve, 5));
    },
    receive: async () => {
        await bus.waitFor(() => bus.lines.length);
        return bus.lines.shift();
    },
};

// Each of these readers ends with the session.
const read = async (readable, take) => {
    const reader = readable.getReader();
    for (let next; !(next = await reader.read()).done;) take(next.value);
};
const readLines = (readable, take) => {
    let rest = '';
    return read(readable.pipeThrough(new TextDecoderStream()), (text) => {
        const parts = (rest + text).split('\n');
        rest = parts.pop();
        parts.forEach((line) => take(JSON.parse(line)));
    });
};
const ended = () => {};
readLines(stream.readable, (line) => bus.lines.push(line)).catch(ended);
read(session.incomingUnidirectionalStreams, async (readable) => {
    if (bus.cancelling) {
        const reader = readable.getReader();
        await reader.read();
        await reader.cancel();
        bus.cancelled = true;
        return;
    }
    let lines;
    readLines(readable, (line) => {
        if (!lines) lines = bus.streams[line.pattern] = [];
        lines.push(line);
    }).catch(ended);
}).catch(ended);
read(session.datagrams.readable, (data) => bus.datagrams.push(JSON.parse(new TextDecoder().decode(data)))).catch(ended);

await bus.send({type: 'auth', token: args[0], protocol: 1}, {type: 'subscribe', pattern: 'web.*'});
return args[1] ? [await bus.receive(), await bus.receive()] : null;
