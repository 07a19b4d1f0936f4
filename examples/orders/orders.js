// The orders of the shop, live: the page reads the table once, and then the changes after it.

import { bus, fetchToken, showState, user } from '../session.js';

const $ = (selector, within = document) => within.querySelector(selector);
const price = new Intl.NumberFormat('en', { style: 'currency', currency: 'EUR' });
const rows = new Map(); // id -> element
let orders = new Map(); // id -> row of the table
let subscription;

showState($('#state'));
bus.connect();

/** Read the table, then follow its changes. */
async function follow() {
  subscription?.close();
  const response = await fetch('list');
  if (!response.ok) {
    $('main').textContent = 'The shop needs PostgreSQL: run the program without DATABASE_URL=memory.';
    return;
  }
  const { epoch, head, orders: list, menu } = await response.json();
  orders = new Map(list.map((order) => [order.id, order]));
  $('.menu').replaceChildren(...Object.entries(menu).map(([item, cents]) => choice(item, price.format(cents / 100), [item])));
  const random = Array.from({ length: 10 }, () => Object.keys(menu)[Math.floor(Math.random() * Object.keys(menu).length)]);
  $('.menu').append(choice('Ten at once', 'a surprise', random));
  render();
  // The server has read the position before the table, so no change is missed. One that the table shows may come again.
  subscription = bus.subscribe('orders.*', ({ payload }) => {
    orders.set(payload.id, payload);
    render();
  }, { since: head, epoch, onGap: follow, onEnd: ({ message }) => { $('#state').textContent = message; } });
}

function choice(title, note, items) {
  const button = document.createElement('button');
  const small = document.createElement('small');
  small.textContent = note;
  button.append(title, small);
  button.onclick = () => items.forEach((item) => post('place', item));
  return button;
}

async function post(path, text) {
  const response = await fetch(path, { method: 'POST', body: text, headers: { Authorization: `Bearer ${await fetchToken()}` } });
  $('#said').textContent = response.ok ? await response.text() : `Not done: ${response.status}`;
}

function render() {
  const newest = [...orders.values()].sort((a, b) => b.id - a.id);
  for (const order of newest) {
    const row = rows.get(order.id) ?? $('#row').content.cloneNode(true).firstElementChild;
    $('.number', row).textContent = `#${order.id}`;
    $('.what b', row).textContent = order.item;
    $('.what small', row).textContent = order.customer === user ? 'for you' : `for ${order.customer}`;
    $('.price', row).textContent = price.format(order.cents / 100);
    const charged = $('.charged', row);
    charged.textContent = order.charges ? `charged by ${order.worker}` : 'charged';
    charged.classList.toggle('reached', order.charges > 0);
    charged.classList.toggle('wrong', order.charges > 1);
    $('.mailed', row).classList.toggle('reached', order.mailed);
    rows.set(order.id, row);
  }
  const elements = newest.map(({ id }) => rows.get(id));
  elements.forEach((row, index) => {
    if ($('#orders').children[index] !== row) $('#orders').insertBefore(row, $('#orders').children[index]);
  });
  $('#placed').textContent = newest.length;
  $('#charged').textContent = newest.filter(({ charges }) => charges > 0).length;
  $('#twice').textContent = newest.filter(({ charges }) => charges > 1).length;
  $('#twice').classList.toggle('wrong', $('#twice').textContent > 0);
  $('.figures').hidden = false;
}

$('#kill').onclick = () => post('kill', '');
await follow();
