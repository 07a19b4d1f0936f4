// What all of these pages need: who the user is, and one client of that user.

import { CatbusClient } from '@catbus/client';

async function fetchText(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return response.text();
}

export const user = new URLSearchParams(location.search).get('user') ?? 'guest';
export const fetchToken = () => fetchText(`/token?user=${encodeURIComponent(user)}`);
export const bus = new CatbusClient({ url: await fetchText('/broker'), token: fetchToken });
bus.on('error', console.error);

/** What a page says about its connection. */
export const describeState = (state) => (state === 'connected' ? `Signed in as ${bus.id}` : `${state}: your changes wait on this page`);

/** Show the state of the connection in an element, and changes of it. */
export function showState(element) {
  bus.onStateChange((state) => {
    element.dataset.state = state;
    element.textContent = describeState(state);
  });
}

/** The hue in which a page shows a name. */
export const hueOf = (name) => [...(name ?? '')].reduce((hue, letter) => (hue * 31 + letter.codePointAt(0)) % 360, 7);

// The links to other versions of a page lead to them as the same user.
for (const link of document.querySelectorAll('nav a[href$=".html"]')) link.search = location.search;
