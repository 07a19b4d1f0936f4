// The metrics of a replica in Prometheus's text format, and what two scrapes say of the time between them.

const LINE = /^(\w+)(?:\{(.*)\})? (\S+)$/;

/** Parse a scrape: `{at, values}`, where `values` maps a name to a list of `{labels, value}`. */
export function parseMetrics(text, at = performance.now() / 1000) {
  const values = new Map();
  for (const line of text.split('\n')) {
    const match = LINE.exec(line);
    if (!match) continue;
    const [, name, labels = '', value] = match;
    if (!values.has(name)) values.set(name, []);
    values.get(name).push({ labels: parseLabels(labels), value: Number(value) });
  }
  return { at, values };
}

function parseLabels(text) {
  const found = {};
  for (const [, name, value] of text.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) found[name] = value;
  return found;
}

/** The sum of a metric over its labels, or over those with the given ones. */
export function total(scrape, name, labels = {}) {
  let sum = 0;
  for (const each of scrape.values.get(name) ?? []) {
    if (Object.entries(labels).every(([key, value]) => each.labels[key] === value)) sum += each.value;
  }
  return sum;
}

/** How much a counter grew per second. A restart of the broker begins it anew. */
export function rateBetween(before, after, name) {
  const growth = total(after, name) - total(before, name);
  return Math.max(growth, 0) / (after.at - before.at);
}

/**
 * A quantile of what a histogram observed between two scrapes, in its unit, interpolated in its bucket. NaN if it observed
 * nothing.
 */
export function quantileBetween(before, after, name, quantile) {
  const buckets = cumulative(after, name);
  const earlier = cumulative(before, name);
  const counts = [...buckets].map(([limit, value]) => [limit, value - (earlier.get(limit) ?? 0)]);
  counts.sort(([a], [b]) => a - b);
  const all = counts.at(-1)?.[1] ?? 0;
  if (!(all > 0)) return NaN;
  let [lower, below] = [0, 0];
  for (const [limit, upTo] of counts) {
    if (upTo >= quantile * all) {
      if (limit === Infinity) return lower;
      return upTo === below ? limit : lower + ((limit - lower) * (quantile * all - below)) / (upTo - below);
    }
    [lower, below] = [limit, upTo];
  }
  return NaN;
}

function cumulative(scrape, name) {
  const found = new Map();
  for (const { labels, value } of scrape.values.get(`${name}_bucket`) ?? []) {
    const limit = labels.le === '+Inf' ? Infinity : Number(labels.le);
    found.set(limit, (found.get(limit) ?? 0) + value);
  }
  return found;
}
