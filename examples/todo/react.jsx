// A shared to-do list with React. `drafts.js` has what is not about this page.

import { useEffect, useState, useSyncExternalStore } from 'react';
import { usePublish, useRetained } from '@catbus/client/react';

import { showPage } from '../page.jsx';
import { user } from '../session.js';
import { Drafts } from './drafts.js';

/** The edits of this user over the retained messages of the list. */
function useDrafts() {
  const publish = usePublish();
  const [drafts] = useState(() => new Drafts(publish, `drafts of ${user}`));
  const { entries, ready, error } = useRetained('todo.*');
  useEffect(() => {
    if (ready) drafts.show(entries);
  }, [drafts, entries, ready]);
  return { drafts, items: useSyncExternalStore(drafts.onChange, () => drafts.items), ready, error };
}

function Item({ item: { channel, text, done, status, why, removes }, drafts }) {
  const now = (change) => {
    drafts.edit(channel, change);
    drafts.save(channel);
  };
  return (
    <li className={[done && 'done', status && 'unsaved', status].filter(Boolean).join(' ')}>
      <div className="line">
        <input type="checkbox" className="check" aria-label="Done" checked={done} onChange={({ target }) => now({ done: target.checked })} />
        <input
          className="text" aria-label="Text" maxLength={200} autoComplete="off" value={text}
          onChange={({ target }) => drafts.edit(channel, { text: target.value })}
          onBlur={() => drafts.save(channel)}
          onKeyDown={({ key, target }) => key === 'Enter' && target.blur()}
        />
        <button className="remove" title="Remove" aria-label="Remove" onClick={() => now(null)}>✕</button>
      </div>
      {status && (
        <div className="note" role="status">
          <span className="why">{why}</span>
          {status !== 'waiting' && (
            <>
              <button className="keep" onClick={() => drafts.keepMine(channel)}>{removes ? 'Remove it' : 'Keep mine'}</button>
              <button className="take" onClick={() => drafts.takeTheirs(channel)}>Take theirs</button>
            </>
          )}
        </div>
      )}
    </li>
  );
}

function Todo() {
  const { drafts, items, ready, error } = useDrafts();
  const add = (event) => {
    event.preventDefault();
    drafts.add(event.target.elements.text.value);
    event.target.reset();
  };
  return (
    <main className="card">
      {error && <p role="alert">{error.message}</p>}
      <form id="add" hidden={!ready} onSubmit={add}>
        <input name="text" maxLength={200} required placeholder="What is to be done?" autoComplete="off" aria-label="New item" />
        <button className="main">Add</button>
      </form>
      <ul id="list">
        {items.map((item) => <Item key={item.channel} item={item} drafts={drafts} />)}
      </ul>
      {ready && !items.length && <p className="empty">Nothing to do. Open this page as somebody else, too.</p>}
    </main>
  );
}

showPage('To do', <Todo />);
