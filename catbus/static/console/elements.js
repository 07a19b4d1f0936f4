// Elements of the page. Texts are text nodes: nothing that a client has sent is ever read as HTML.

/**
 * Make an element. `props` are its attributes; functions are listeners, and `class` may be a list with false items.
 */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  setProps(element, props);
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Make an element of an SVG drawing. */
export function svg(tag, props = {}, ...children) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  setProps(element, props);
  element.append(...children);
  return element;
}

function setProps(element, props) {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (typeof value === 'function') element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? '' : value);
  }
}

/** A heading of a view with what it is about. */
export const title = (text, ...about) => [h('h1', {}, text), h('p', { class: 'quiet' }, ...about)];

/** A figure with its meaning. */
export const figure = (value, meaning, kind = '') => h('div', { class: 'figure' }, h('b', { class: kind }, value), h('span', {}, meaning));

/** An error for people. */
export const errorBox = (error) => h('p', { class: 'error', role: 'alert' }, error.message ?? String(error));

/**
 * A table. `columns` are `{name, kind, cell}`: the heading, the class of its cells, and a function from a row to what the
 * cell shows. `empty` is shown if there are no rows.
 */
export function table(label, columns, rows, empty = 'none') {
  const heading = h('tr', {}, columns.map(({ name, kind }) => h('th', { scope: 'col', class: kind }, name)));
  const lines = rows.map((row) => h('tr', {}, columns.map(({ kind, cell }) => h('td', { class: kind }, cell(row) ?? ''))));
  const none = h('tr', {}, h('td', { class: 'empty', colspan: columns.length }, empty));
  return h('div', { class: 'scroll', role: 'region', 'aria-label': label, tabindex: 0 },
    h('table', {}, h('thead', {}, heading), h('tbody', {}, lines.length ? lines : none)));
}

/** A button that shows the error of its action. `confirmation` is asked first, if given. */
export function button(text, action, { confirmation, main = false } = {}) {
  return h('button', {
    type: 'button',
    class: main && 'main',
    click: async ({ currentTarget }) => {
      if (confirmation && !confirm(confirmation)) return;
      currentTarget.disabled = true;
      try {
        await action();
      } catch (error) {
        alert(error.message);
      } finally {
        currentTarget.disabled = false;
      }
    },
  }, text);
}

/** A form that calls `submit(values)`, and shows its error. */
export function form(submit, ...children) {
  const place = h('div', { 'aria-live': 'polite' });
  const element = h('form', {
    submit: async (event) => {
      event.preventDefault();
      place.replaceChildren();
      try {
        await submit(Object.fromEntries(new FormData(element)), place);
      } catch (error) {
        place.replaceChildren(errorBox(error));
      }
    },
  }, ...children);
  return h('div', {}, element, place);
}

/** An input with its label. */
export const field = (label, props, kind = '') => h('label', { class: kind }, label, h('input', { autocomplete: 'off', spellcheck: 'false', ...props }));
