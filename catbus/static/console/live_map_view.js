// A view of a live map: a form for its pattern, and below it what the map shows.

import { errorBox, field, form, h } from './elements.js';

/**
 * Fill a view. `open(pattern, options)` opens the map; `show(map)` returns its elements, anew after each change, but at
 * most once a frame. `name` is that of the view in the fragment. `extra` stands beside the button of the form.
 */
export function liveMapView(place, { name, heading, open, show, extra = [], parameters, signal }) {
  const content = h('div', {});
  let opening = new AbortController();
  signal.addEventListener('abort', () => opening.abort());

  const openPattern = async (pattern) => {
    opening.abort();
    opening = new AbortController();
    const { signal: mine } = opening;
    const fail = (error) => content.replaceChildren(errorBox(error));
    content.replaceChildren(h('p', { class: 'quiet' }, 'Reading …'));
    try {
      const map = await open(pattern, { signal: mine, onEnd: fail });
      let drawing = false;
      const draw = () => {
        drawing = false;
        if (!mine.aborted) content.replaceChildren(...[show(map)].flat());
      };
      map.onChange(() => {
        if (!drawing) requestAnimationFrame(draw);
        drawing = true;
      });
      draw();
    } catch (error) {
      if (!mine.aborted) fail(error);
    }
  };

  const pattern = parameters.get('pattern') ?? '*';
  place.append(
    ...heading,
    form((values) => {
      history.replaceState(null, '', `#${name}?${new URLSearchParams({ pattern: values.pattern })}`);
      openPattern(values.pattern);
    }, field('Pattern', { name: 'pattern', required: true, value: pattern }, 'wide'), h('button', { class: 'main' }, 'Show'), ...extra),
    content);
  openPattern(pattern);
}
