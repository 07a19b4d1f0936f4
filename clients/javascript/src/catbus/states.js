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
    'a transport is open': 'authenticating',
    'every way has failed': 'reconnecting',
    'ended for good': 'disconnected',
    'disconnect()': 'disconnected',
  },
  authenticating: {
    'a transport is open': 'authenticating',
    'the token is accepted': 'connected',
    'every way has failed': 'reconnecting',
    'ended for good': 'disconnected',
    'disconnect()': 'disconnected',
  },
  connected: {
    'moved to another connection': 'connected',
    'the connection is lost': 'reconnecting',
    'ended for good': 'disconnected',
    'disconnect()': 'disconnected',
  },
  reconnecting: {
    'a transport is open': 'authenticating',
    'the token is accepted': 'connected',
    'every way has failed': 'reconnecting',
    'ended for good': 'disconnected',
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
