/**
 * Splits a stream of text into JSON objects (section 4 of the specification).
 *
 * @module
 */

import { CatbusError } from './errors.js';

/**
 * Splits a stream of text into JSON objects, which end where their braces balance (section 4).
 *
 * Every character is scanned once, however the text is split.
 */
export class JsonSplitter {
  #rest = '';
  #scanned = 0;
  #depth = 0;
  #quoted = false;
  #parse;

  /** @param {(json: string) => any} [parse] decodes the text of an object */
  constructor(parse = JSON.parse) {
    this.#parse = parse;
  }

  /**
   * Call `take` with each object that is complete. Throws for anything else, after the objects before it.
   *
   * @param {string} text @param {(object: any) => void} take
   */
  feed(text, take) {
    let rest = this.#rest + text;
    let start = 0;
    const marks = /["\\{}]/g;
    marks.lastIndex = this.#scanned;
    for (;;) {
      if (this.#depth === 0) {
        // Only white space is allowed between objects.
        while (start < rest.length && ' \t\r\n'.includes(rest[start])) start++;
        if (start === rest.length) break;
        if (rest[start] !== '{') throw new CatbusError('bad_message', 'the broker sent no JSON object');
        marks.lastIndex = start + 1;
        this.#depth = 1;
      }
      const mark = marks.exec(rest);
      if (mark === null) {
        marks.lastIndex = rest.length;
        break;
      }
      const character = mark[0];
      if (character === '\\') {
        if (marks.lastIndex === rest.length) {
          marks.lastIndex--; // The escaped character has not arrived.
          break;
        }
        marks.lastIndex++;
      } else if (character === '"') {
        this.#quoted = !this.#quoted;
      } else if (!this.#quoted) {
        this.#depth += character === '{' ? 1 : -1;
        if (this.#depth === 0) {
          const end = marks.lastIndex;
          take(this.#parse(rest.slice(start, end)));
          marks.lastIndex = start = end;
        }
      }
    }
    this.#rest = rest.slice(start);
    this.#scanned = this.#depth ? Math.max(0, marks.lastIndex - start) : 0;
  }
}
