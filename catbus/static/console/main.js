// The console: sign in with a token, and look at what that token may see.

import { CatbusClient } from '../catbus.js';
import { apiWith } from './api.js';
import { errorBox, form, h, title } from './elements.js';
import { channelsView } from './views/channels.js';
import { consumersView } from './views/consumers.js';
import { messagesView } from './views/messages.js';
import { overviewView } from './views/overview.js';
import { presenceView } from './views/presence.js';
import { retainedView } from './views/retained.js';
import { sessionsView } from './views/sessions.js';

const STORED_TOKEN = 'catbus-console-token';

// `show(place, {client, api, parameters, signal})` fills a view; `signal` aborts when it is left.
const VIEWS = {
  overview: { name: 'Overview', show: overviewView, administrator: true },
  channels: { name: 'Channels', show: channelsView, administrator: true },
  messages: { name: 'Messages', show: messagesView },
  retained: { name: 'Retained', show: retainedView },
  presence: { name: 'Presence', show: presenceView },
  sessions: { name: 'Sessions', show: sessionsView, administrator: true },
  consumers: { name: 'Consumers', show: consumersView, administrator: true },
};

const $ = (selector) => document.querySelector(selector);
let signedIn; // {client, api, administrator}
let leaveView = new AbortController();

/** A token in the fragment of the URL, as `catbus run` prints it. It is removed from the URL and from the history. */
function takeTokenFromUrl() {
  const given = new URLSearchParams(location.hash.slice(1)).get('token');
  if (given) history.replaceState(null, '', location.pathname);
  return given;
}

async function signIn(token) {
  const client = new CatbusClient({
    url: new URL('ws', document.baseURI).href.replace(/^http/, 'ws'),
    token,
  });
  client.on('error', (error) => console.error(error));
  // Wait only for the first verdict: a broker that is away is tried again and again.
  await Promise.race([client.connect(), new Promise((resolve) => setTimeout(resolve, 3000))]);
  const api = apiWith(token);
  const administrator = await api('api/replicas').then(() => true, (error) => {
    if (error.status !== 403) throw error;
    return false;
  });
  sessionStorage.setItem(STORED_TOKEN, token);
  signedIn = { client, api, administrator };
  client.onStateChange(showConnection);
  showConnection();
}

function showConnection() {
  const { client, administrator } = signedIn;
  const who = client.id ? `as ${client.id}` : '';
  const rights = administrator ? 'administrator' : 'not an administrator: views of the whole broker are hidden';
  $('#connection').textContent = client.connectionState === 'connected'
    ? `${location.host} · signed in ${who} (${rights})`
    : `${location.host} · ${client.connectionState}`;
}

async function signOut() {
  sessionStorage.removeItem(STORED_TOKEN);
  leaveView.abort();
  const { client } = signedIn;
  signedIn = undefined;
  $('#connection').textContent = '';
  history.replaceState(null, '', location.pathname);
  await client.disconnect();
  showSignIn();
}

function showSignIn(error) {
  $('#navigation').hidden = true;
  $('#sign-out').hidden = true;
  $('#main').replaceChildren(h('div', { class: 'sign-in' },
    title('Sign in', 'Paste a token. It stays in this tab of your browser. ', h('code', {}, 'catbus grant -p read \'*\' -p write \'*\''),
      ' makes one for an administrator; other tokens see the channels that they may read.'),
    form(async ({ token }) => {
      await signIn(token.trim());
      showView();
    }, h('label', { class: 'wide' }, 'Token', h('input', { name: 'token', type: 'password', required: true, autocomplete: 'off' })),
    h('button', { class: 'main' }, 'Sign in')),
    error && errorBox(error)));
  $('#main input').focus();
}

/** Show the view that the fragment names, such as `#messages?pattern=a.*`. */
function showView() {
  if (!signedIn) return;
  leaveView.abort();
  leaveView = new AbortController();
  const allowed = Object.entries(VIEWS).filter(([, { administrator }]) => signedIn.administrator || !administrator);
  const [wanted, query = ''] = location.hash.slice(1).split('?', 2);
  const [key, view] = allowed.find(([name]) => name === wanted) ?? allowed[0];
  $('#navigation').hidden = false;
  $('#sign-out').hidden = false;
  $('#navigation').replaceChildren(...allowed.map(([name, each]) => (
    h('a', { href: `#${name}`, 'aria-current': name === key && 'page' }, each.name))));
  $('#navigation [aria-current]').scrollIntoView({ block: 'nearest', inline: 'center' });
  document.title = `${view.name} · Catbus console`;
  const place = h('div', {});
  $('#main').replaceChildren(place);
  const { client, api } = signedIn;
  view.show(place, { client, api, parameters: new URLSearchParams(query), signal: leaveView.signal });
}

$('#sign-out').addEventListener('click', signOut);
addEventListener('hashchange', () => {
  if (!location.hash.startsWith('#main')) showView();
});

const token = takeTokenFromUrl() ?? sessionStorage.getItem(STORED_TOKEN);
if (token) {
  try {
    await signIn(token);
    showView();
  } catch (error) {
    showSignIn(error);
  }
} else {
  showSignIn();
}
