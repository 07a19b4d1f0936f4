/** The modules of the client that the model uses, of a directory: that of the client, or of one with a planted mistake. */

const NAMES = ['core', 'live_maps', 'presence_feed', 'presence_state', 'retained_feed', 'retained_state'];

export async function loadModules(directory = new URL('../src/catbus/', import.meta.url)) {
  return Object.assign({}, ...(await Promise.all(NAMES.map((name) => import(new URL(`${name}.js`, directory))))));
}
