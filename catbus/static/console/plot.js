// A plot of one or two series over the last minutes.

import { h, svg } from './elements.js';

const WIDTH = 300;
const HEIGHT = 100;

/**
 * Draw a plot. `series` are `{name, values}` with the newest value last; NaN is a hole. `format` writes a value for people.
 */
export function plot(name, series, format, length) {
  const finite = series.flatMap(({ values }) => values.filter(Number.isFinite));
  const top = Math.max(...finite, 0) || 1;
  const lines = series.map(({ values }, index) => svg('path', { class: `series-${index}`, d: path(values, top, length) }));
  const last = ({ values }) => format(values.at(-1) ?? NaN);
  const legend = series.map((each, index) => h('span', { class: `series-${index}` }, `${each.name} ${last(each)}`));
  return h('figure', { class: 'plot' },
    h('figcaption', {}, h('b', {}, name), legend, h('span', {}, `top ${finite.length ? format(top) : '–'}`)),
    svg('svg', { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: 'none', 'aria-hidden': 'true' },
      svg('line', { x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT }), ...lines));
}

function path(values, top, length) {
  const step = WIDTH / (length - 1);
  const first = length - values.length;
  let drawing = false;
  return values.map((value, index) => {
    const command = drawing ? 'L' : 'M';
    drawing = Number.isFinite(value);
    if (!drawing) return '';
    return `${command}${((first + index) * step).toFixed(1)} ${(HEIGHT - (value / top) * HEIGHT).toFixed(1)}`;
  }).join('');
}
