// Print the id and the data of each message of an event stream, with the package `eventsource`: FROM URL [LAST_ID].
// FROM: the file from whose place the package is found.

import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const [from, url, lastId] = process.argv.slice(2);
const { EventSource } = await import(pathToFileURL(createRequire(from).resolve('eventsource')).href);

const source = new EventSource(url, {
    fetch: (input, init) => fetch(input, {
        ...init,
        headers: {
            Authorization: `Bearer ${process.env.CATBUS_TOKEN}`,
            ...lastId && { 'Last-Event-ID': lastId },
            // After the first message the package sends the id itself.
            ...init.headers,
        },
    }),
});
source.onmessage = ({ data, lastEventId }) => console.log(lastEventId, data);
source.onerror = ({ code, message }) => {
    if (source.readyState === EventSource.CLOSED) {
        console.error(code, message);
        process.exit(1);
    }
};
