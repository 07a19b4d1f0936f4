/**
 * The states of a client, as a table: from each state, the events that can come and the state after them.
 *
 * The diagram in the README is made from it.
 *
 * @module
 */

/** @typedef {'disconnected' | 'connecting' | 'authenticating' | 'connected' | 'reconnecting'} ConnectionState */

/** @type {Record<ConnectionState, Record<string, ConnectionState>>} */
export const TRANSITIONS = {
  disconnected: { 'connect()': 'connecting' },
  connecting: {
    'transport open': 'authenticating',
    'all attempts failed': 'reconnecting',
    'final error': 'disconnected',
    'disconnect()': 'disconnected',
  },
  authenticating: {
    'transport open': 'authenticating',
    'authenticated': 'connected',
    'all attempts failed': 'reconnecting',
    'final error': 'disconnected',
    'disconnect()': 'disconnected',
  },
  connected: {
    'moved': 'connected',
    'connection lost': 'reconnecting',
    'final error': 'disconnected',
    'disconnect()': 'disconnected',
  },
  reconnecting: {
    'transport open': 'authenticating',
    'authenticated': 'connected',
    'all attempts failed': 'reconnecting',
    'final error': 'disconnected',
    'disconnect()': 'disconnected',
  },
};

/** The table as a Mermaid diagram. @returns {string} */
export function diagram() {
  const lines = ['stateDiagram-v2', '    [*] --> disconnected'];
  for (const [from, events] of Object.entries(TRANSITIONS)) {
    for (const [event, to] of Object.entries(events)) if (from !== to) lines.push(`    ${from} --> ${to}: ${event}`);
  }
  return lines.join('\n');
}
