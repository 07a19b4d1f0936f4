// Numbers, sizes and times for people.

const compact = new Intl.NumberFormat('en', { notation: 'compact', maximumFractionDigits: 1 });
const plain = new Intl.NumberFormat('en');

export const count = (value) => (value === null || value === undefined ? '–' : plain.format(value));

/** A number per second, with two digits at least. */
export const rate = (value) => (Number.isFinite(value) ? `${value < 10 ? Number(value.toPrecision(2)) : compact.format(value)}/s` : '–');

export function bytes(value) {
  if (!Number.isFinite(value)) return '–';
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; unit += 1) value /= 1024;
  return `${unit && value < 10 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

/** A time of `seconds`, such as `1.5 ms` or `3 h`. */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return '–';
  if (seconds < 1) return `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
  for (const [unit, length] of [['d', 86_400], ['h', 3600], ['min', 60]]) {
    if (seconds >= length) return `${Math.round(seconds / length)} ${unit}`;
  }
  return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
}

/** When something was, from milliseconds since 1970. */
export const time = (at) => (at ? new Date(at).toLocaleTimeString([], { hour12: false }) : '–');

export const ago = (at) => (at ? `${duration(Math.max(0, (Date.now() - at) / 1000))} ago` : '–');

/** JSON in one line, cut after `most` characters. */
export function json(value, most = 400) {
  const text = JSON.stringify(value) ?? '';
  return text.length > most ? `${text.slice(0, most)} …` : text;
}
