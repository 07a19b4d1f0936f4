// The edits of a to-do list that the broker has not accepted yet, for any user interface. Each item of the list is the
// retained message of a channel `todo.ID`: {text, done}.
//
// A draft is published with the seq of the version that the user has changed, so the broker refuses it if somebody else was
// faster; the user then chooses. Drafts are in the session storage: they wait for a connection, and outlive a reload.

export class Drafts {
  #publish;
  #storageKey;
  #todos; // channel -> the retained message that the list shows; undefined before the first call of `show`
  #drafts; // channel -> {payload, expect, error?, conflict?}
  #saving = new Set(); // channels whose draft is being published
  #listeners = new Set();
  #shown = new Set(); // what waits for the list to change

  /** What the page shows, sorted: {channel, text, done, status, why, removes}. Another array after each change. */
  items = [];

  /** `publish` is that of the client. The drafts are stored under `storageKey`. */
  constructor(publish, storageKey) {
    this.#publish = publish;
    this.#storageKey = storageKey;
    this.#drafts = new Map(JSON.parse(sessionStorage.getItem(storageKey) ?? '[]'));
    this.#update();
  }

  /** Call `listener` after each change of `items`. Returns a function that removes it. */
  onChange = (listener) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  /** Take the retained messages of the list. Call it again when they have changed. */
  show(todos) {
    const first = this.#todos === undefined;
    this.#todos = new Map(todos);
    for (const check of this.#shown) check();
    this.#update();
    if (first) for (const channel of this.#drafts.keys()) this.save(channel);
  }

  add(text) {
    const channel = `todo.${Date.now()}-${Math.random().toString(36).slice(2)}`;
    this.edit(channel, { text, done: false });
    this.save(channel);
  }

  /** Change the draft of an item, without publishing it. `null` removes the item. */
  edit(channel, change) {
    const draft = this.#drafts.get(channel) ?? { expect: this.#seqOf(channel) };
    draft.payload = change && { ...this.#versionOf(channel), ...change };
    this.#drafts.set(channel, draft);
    // The user may have taken the change back.
    if (this.#isShown(channel, draft.payload) && !this.#saving.has(channel)) this.#drafts.delete(channel);
    this.#update();
  }

  /** Publish the draft of an item, and what the user changes meanwhile. */
  async save(channel) {
    const draft = this.#drafts.get(channel);
    if (!draft || draft.conflict || this.#saving.has(channel)) return;
    this.#saving.add(channel);
    delete draft.error;
    for (let saved; draft.payload !== saved && !draft.error && !draft.conflict;) {
      const { payload, expect } = draft;
      const shown = this.#nextVersion(channel, expect);
      try {
        const { seq } = await this.#publish(channel, payload, { retain: true, expect });
        draft.expect = payload === null ? 0 : seq;
        saved = payload;
        // Without the draft, the item must not fall back to the version before.
        if (!this.#isShown(channel, payload)) await shown;
      } catch (error) {
        if (error.code === 'conflict') await shown;
        // An earlier attempt may have been published without the reply, so look at what is there.
        if (this.#isShown(channel, draft.payload)) break;
        if (error.code === 'conflict') draft.conflict = true;
        else draft.error = error.message;
      }
    }
    this.#saving.delete(channel);
    if (!draft.error && !draft.conflict) this.#drafts.delete(channel);
    this.#update();
  }

  /** Publish the draft in place of the version that the list shows now. */
  keepMine(channel) {
    const draft = this.#drafts.get(channel);
    delete draft.conflict;
    draft.expect = this.#seqOf(channel);
    this.save(channel);
  }

  takeTheirs(channel) {
    this.#drafts.delete(channel);
    this.#update();
  }

  #seqOf(channel) {
    return this.#todos?.get(channel)?.seq ?? 0;
  }

  #versionOf(channel) {
    return this.#drafts.get(channel)?.payload ?? this.#todos?.get(channel)?.payload ?? { text: '', done: false };
  }

  #isShown(channel, payload) {
    const { text, done } = this.#todos?.get(channel)?.payload ?? {};
    return payload?.text === text && payload?.done === done;
  }

  /** Wait until the list shows another version of an item than `seq`. */
  #nextVersion(channel, seq) {
    return new Promise((resolve) => {
      const check = () => {
        if (this.#seqOf(channel) === seq) return;
        this.#shown.delete(check);
        resolve();
      };
      this.#shown.add(check);
      check();
    });
  }

  /** Why an item is not saved. */
  #explain(channel, { conflict, error }) {
    if (error) return `Not saved: ${error}`;
    if (!conflict) return 'Not saved yet';
    const theirs = this.#todos?.get(channel);
    if (!theirs) return 'Somebody has removed this item.';
    const { text, done } = theirs.payload;
    return `${theirs.sender ?? 'Somebody'} has changed it to “${text}”${done ? ', done' : ''}.`;
  }

  #update() {
    sessionStorage.setItem(this.#storageKey, JSON.stringify([...this.#drafts]));
    const channels = [...new Set([...(this.#todos?.keys() ?? []), ...this.#drafts.keys()])].sort();
    this.items = channels.map((channel) => {
      const draft = this.#drafts.get(channel);
      return {
        channel,
        ...this.#versionOf(channel),
        status: draft && ((draft.conflict && 'conflict') || (draft.error && 'failed') || 'waiting'),
        why: draft && this.#explain(channel, draft),
        removes: draft?.payload === null,
      };
    });
    for (const listener of this.#listeners) listener();
  }
}
