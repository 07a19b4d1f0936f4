// The tree of the busiest channels with their rates, and the patterns with the most subscriptions.

import { h, table, title } from '../elements.js';
import { count, rate } from '../format.js';
import { poll } from '../polling.js';

const watch = (pattern, text = pattern) => h('a', { href: `#messages?${new URLSearchParams({ pattern })}` }, text);

export function channelsView(place, { api, signal }) {
  const content = h('div', {});
  place.append(...title('Channels', 'The channels with the most messages within the last minute on this replica. A link opens the messages.'), content);
  poll(content, signal, 3000, async () => show(await api('api/channels', { query: { limit: 500 }, signal })));
}

function show({ channels, patterns, seconds, messages, missed }) {
  const about = `${rate(messages / seconds)} in all.${missed ? ` Each number may be too low by ${count(missed)}.` : ''}`;
  return [
    h('p', {}, about),
    channels.length ? h('ul', { class: 'tree' }, branches(treeOf(channels), seconds)) : h('p', { class: 'quiet' }, 'No message within the last minute.'),
    h('h2', {}, 'Subscriptions by pattern'),
    table('Subscriptions', [
      { name: 'Pattern', cell: ({ pattern }) => watch(pattern) },
      { name: 'Subscriptions', kind: 'number', cell: ({ subscriptions }) => count(subscriptions) },
      { name: 'Lagging', kind: 'number', cell: ({ lagging }) => count(lagging) },
    ], patterns, 'No subscription.'),
  ];
}

/** Arrange channels by their segments: `{name, path, messages, subscriptions, isChannel, children}`. */
export function treeOf(channels) {
  const root = { children: new Map(), messages: 0 };
  for (const { channel, messages, subscriptions } of channels) {
    let node = root;
    const segments = channel.split('.');
    segments.forEach((name, index) => {
      if (!node.children.has(name)) {
        node.children.set(name, { name, path: segments.slice(0, index + 1).join('.'), messages: 0, children: new Map() });
      }
      node = node.children.get(name);
      node.messages += messages;
    });
    Object.assign(node, { isChannel: true, subscriptions });
  }
  return root;
}

function branches({ children }, seconds) {
  return [...children.values()].sort((a, b) => b.messages - a.messages).map((node) => h('li', {},
    h('div', { class: 'row' },
      watch(node.isChannel && !node.children.size ? node.path : `${node.path}.*`, node.name),
      node.isChannel && h('span', {}, `${count(node.subscriptions)} subscribed`),
      h('span', {}, rate(node.messages / seconds))),
    node.children.size > 0 && h('ul', {}, branches(node, seconds))));
}
