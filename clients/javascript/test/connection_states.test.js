import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';

import * as client from '../src/catbus.js';
import { TRANSITIONS, diagram } from '../src/catbus/connection_states.js';

test('diagram in the README agrees with the table of states', () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8');
  assert.equal(/```mermaid\n(.*?)\n```/s.exec(readme)[1], diagram());
});

test('every state can be reached and left', () => {
  const reached = new Set(Object.values(TRANSITIONS).flatMap((events) => Object.values(events)));
  assert.deepEqual([...reached].sort(), Object.keys(TRANSITIONS).sort());
});

test('only the public names are exported', () => {
  const names = ['CatbusClient', 'CatbusError', 'Disconnected', 'DisconnectedError', 'Refused', 'RefusedError'];
  assert.deepEqual(Object.keys(client).sort(), names);
});
