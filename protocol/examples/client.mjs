// A client of `catbus.v1` in one file, written from the specification alone, for plain Node without packages. It runs the
// sessions of `protocol/vectors/sessions.json` against a running broker and reports which of them passed.
//
//   node protocol/examples/client.mjs ws://127.0.0.1:8080/ws SECRET

import { createHmac, randomBytes } from 'node:crypto';
import { readFileSync, realpathSync } from 'node:fs';
import { request } from 'node:http';
import { fileURLToPath } from 'node:url';

const file = new URL('../vectors/sessions.json', import.meta.url);
export const { sessions } = JSON.parse(readFileSync(file, 'utf8'));

/** A token (section 13). */
function sign({ client_id, grants }, secret) {
  const claims = { client_id, grants: { grants: grants.map(([grant_type, pattern]) => ({ grant_type, pattern })) } };
  const text = Buffer.from(JSON.stringify(claims)).toString('base64url');
  return `sub-${text}.${createHmac('sha256', secret).update(text).digest().subarray(0, 16).toString('base64url')}`;
}

/** The part of WebSocket (RFC 6455) that the vectors need: sends text, receives text and a closing code. */
class Connection {
  #socket;
  #bytes = Buffer.alloc(0);
  #text = '';
  #objects = [];
  #wake = () => {};
  code = undefined;

  static open(url) {
    const headers = {
      Connection: 'Upgrade',
      Upgrade: 'websocket',
      'Sec-WebSocket-Version': '13',
      'Sec-WebSocket-Key': randomBytes(16).toString('base64'),
    };
    return new Promise((resolve, reject) => {
      const asked = request(url.replace(/^ws/, 'http'), { headers });
      asked.on('upgrade', (_, socket, head) => resolve(new Connection(socket, head)));
      asked.on('response', ({ statusCode }) => reject(new Error(`HTTP ${statusCode}`)));
      asked.on('error', reject);
      asked.end();
    });
  }

  constructor(socket, head) {
    this.#socket = socket;
    socket.on('data', (data) => this.#take(data));
    socket.on('close', () => ((this.code ??= 1006), this.#wake()));
    socket.on('error', () => {});
    this.#take(head);
  }

  send(text) {
    this.#write(1, Buffer.from(text));
  }

  close() {
    this.#write(8, Buffer.from([3, 232]));
    this.#socket.end();
  }

  /** The next object other than `head`, or undefined when the connection is closed. */
  async receive() {
    for (;;) {
      while (this.#objects.length) {
        const object = this.#objects.shift();
        if (object.type !== 'head') return object;
      }
      if (this.code !== undefined) return undefined;
      await new Promise((resolve) => (this.#wake = resolve));
    }
  }

  #write(opcode, payload) {
    const mask = randomBytes(4);
    const length = payload.length < 126 ? [payload.length] : [126, payload.length >> 8, payload.length & 255];
    const head = Buffer.from([0x80 | opcode, 0x80 | length[0], ...length.slice(1)]);
    this.#socket.write(Buffer.concat([head, mask, payload.map((byte, at) => byte ^ mask[at % 4])]));
  }

  #take(data) {
    this.#bytes = Buffer.concat([this.#bytes, data]);
    for (;;) {
      const bytes = this.#bytes;
      if (bytes.length < 2) return;
      let [size, at] = [bytes[1] & 127, 2];
      if (size === 126) [size, at] = [bytes.length < 4 ? Infinity : bytes.readUInt16BE(2), 4];
      else if (size === 127) [size, at] = [bytes.length < 10 ? Infinity : Number(bytes.readBigUInt64BE(2)), 10];
      if (bytes.length < at + size) return;
      const payload = bytes.subarray(at, at + size);
      this.#bytes = bytes.subarray(at + size);
      const opcode = bytes[0] & 15;
      if (opcode === 1) this.#split(payload.toString());
      else if (opcode === 8) this.code = payload.length < 2 ? 1005 : payload.readUInt16BE(0);
      else if (opcode === 9) this.#write(10, payload);
      this.#wake();
    }
  }

  /** Queues the complete objects of the received text. Objects end where their braces balance (section 4). */
  #split(text) {
    this.#text += text;
    let [depth, quoted, start] = [0, false, 0];
    for (let at = 0; at < this.#text.length; at++) {
      const character = this.#text[at];
      if (quoted && character === '\\') at++;
      else if (character === '"') quoted = !quoted;
      else if (!quoted && character === '{') depth++;
      else if (!quoted && character === '}' && --depth === 0) {
        this.#objects.push(JSON.parse(this.#text.slice(start, at + 1)));
        start = at + 1;
      }
    }
    this.#text = this.#text.slice(start);
  }
}

/**
 * Runs one session of the vectors; throws if the broker sends something else. `open` makes a connection: an object with
 * `send(text)`, `receive()`, `close()` and `code`. If `send` returns `false`, the connection cannot send this text, and the
 * steps that receive its replies are skipped.
 */
export async function run({ tokens, steps }, open, secret) {
  const word = randomBytes(4).toString('hex');
  let names = new Map();
  const connections = new Map();
  const silent = new Set();

  const filled = (value) => {
    if (Array.isArray(value)) return value.map(filled);
    if (value && typeof value === 'object') return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, filled(v)]));
    if (typeof value !== 'string') return value;
    if (names.has(value)) return names.get(value);
    return value.replaceAll('${run}', word).replace(/\$\{token:(\w+)\}/g, (_, name) => sign(tokens[name], secret));
  };
  const fits = (wanted, found, known) => {
    if (wanted === '$absent') return found === undefined;
    if (wanted === '$int') return Number.isInteger(found);
    if (wanted === '$string') return typeof found === 'string';
    if (typeof wanted === 'string' && /^\$\w+$/.test(wanted)) {
      if (!known.has(wanted)) known.set(wanted, found);
      return found !== undefined && known.get(wanted) === found;
    }
    if (wanted && typeof wanted === 'object') {
      if (!found || typeof found !== 'object' || Array.isArray(wanted) !== Array.isArray(found)) return false;
      if (Array.isArray(wanted) && wanted.length !== found.length) return false;
      return Object.keys(wanted).every((key) => fits(wanted[key], found[key], known));
    }
    return filled(wanted) === found;
  };
  const is = (wanted, found) => {
    const known = new Map(names);
    if (!fits(wanted, found, known)) return false;
    names = known;
    return true;
  };

  for (const [number, step] of steps.entries()) {
    const name = step.send ?? step.receive ?? step.close ?? step.closed;
    if (!connections.has(name)) connections.set(name, await open());
    const connection = connections.get(name);
    const fail = (received) => {
      throw new Error(`step ${number + 1}: received ${JSON.stringify(received)}`);
    };
    if (step.send) {
      silent.delete(name);
      if ((await connection.send(step.text ?? JSON.stringify(filled(step.object)))) === false) silent.add(name);
    } else if (step.close) {
      connection.close();
    } else if (silent.has(name)) {
      continue;
    } else if (step.closed) {
      while (await connection.receive());
      if (connection.code !== step.code) fail(connection.code);
    } else if (step.unordered) {
      const received = [];
      while (received.length < step.unordered.length) received.push(await connection.receive());
      for (const wanted of step.unordered) {
        const at = received.findIndex((object) => is(wanted, object));
        if (at < 0) fail(received);
        received.splice(at, 1);
      }
    } else {
      const received = await connection.receive();
      if (!is(step.object ?? step.exactly, received)) fail(received);
      if (step.exactly && Object.keys(received).length !== Object.keys(step.exactly).length) fail(received);
    }
  }
  for (const connection of connections.values()) connection.close();
}

async function main([url, secret]) {
  let good = 0;
  for (const session of sessions) {
    try {
      await run(session, () => Connection.open(url), secret);
      good++;
      console.log(`ok      ${session.name}`);
    } catch (error) {
      console.log(`not ok  ${session.name}: ${error.message}`);
    }
  }
  console.log(`${good} of ${sessions.length} sessions`);
  process.exit(good === sessions.length ? 0 : 1);
}

if (process.argv[1] && realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) await main(process.argv.slice(2));
