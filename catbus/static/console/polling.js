// Repeats a request while its view is open and the page is visible.

import { errorBox } from './elements.js';

/**
 * Call `load()` at once and then every `interval` milliseconds, and put what it returns into `place`. An error is shown
 * there, too. Waits for one call before the next. Returns a function that calls it now.
 */
export function poll(place, signal, interval, load) {
  let timer;
  let running = false;
  const refresh = async () => {
    clearTimeout(timer);
    if (running || signal.aborted) return;
    running = true;
    try {
      const shown = await load();
      if (!signal.aborted) replace(place, [shown].flat());
    } catch (error) {
      if (!signal.aborted) place.replaceChildren(errorBox(error));
    }
    running = false;
    if (!document.hidden) timer = setTimeout(refresh, interval);
  };
  document.addEventListener('visibilitychange', () => !document.hidden && refresh(), { signal });
  signal.addEventListener('abort', () => clearTimeout(timer));
  refresh();
  return refresh;
}

/** Replace what a place shows. The element with the same position gets the focus, so that a keyboard keeps its place. */
function replace(place, children) {
  const focusable = () => [...place.querySelectorAll('a, button, [tabindex]')];
  const position = focusable().indexOf(document.activeElement);
  place.replaceChildren(...children);
  if (position >= 0) focusable()[position]?.focus({ preventScroll: true });
}
