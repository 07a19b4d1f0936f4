// A chat room with React: the last messages and then new ones, who is here, and who is typing.

import { useEffect, useLayoutEffect, useRef, useState } from 'react';
import { useCatbus, useMessages, usePresence, usePublish, useSubscription } from '@catbus/client/react';

import { showPage } from '../page.jsx';
import { hueOf, user } from '../session.js';
import { ROOM, TYPING, TYPING_INTERVAL, TYPING_SHOWN, describeTypists, timeOf } from './room.js';

const Person = ({ name }) => <span className="person" aria-hidden="true" style={{ '--hue': hueOf(name) }}>{name.slice(0, 1)}</span>;

/** Be in the room while the page is open. */
function useMembership() {
  const bus = useCatbus();
  useEffect(() => {
    const membership = bus.join(ROOM);
    return () => void membership.leave();
  }, [bus]);
}

function People() {
  const { entries } = usePresence(ROOM);
  const names = (entries.get(ROOM) ?? []).map(({ clientId }) => clientId).sort();
  return (
    <ul id="people" aria-label="Who is here">
      {names.map((name) => <li key={name}><Person name={name} /><span className="name">{name}</span></li>)}
    </ul>
  );
}

function Line({ text, sender, note, status }) {
  return (
    <li className={[sender === user && 'mine', status].filter(Boolean).join(' ')}>
      <Person name={sender} />
      <span className="by"><b className="name">{sender}</b><time>{note}</time></span>
      <span className="said">{text}</span>
    </li>
  );
}

/** The messages of the room, and those of this page that are not published yet. */
function Messages({ unsent }) {
  const { messages, gap, error } = useMessages(ROOM, { last: 50 });
  const list = useRef(null);
  const atEnd = useRef(true);
  useLayoutEffect(() => {
    if (atEnd.current) list.current.scrollTop = list.current.scrollHeight;
  }, [messages, unsent]);
  const onScroll = ({ target }) => {
    atEnd.current = target.scrollHeight - target.scrollTop - target.clientHeight < 50;
  };
  return (
    <ol id="messages" aria-live="polite" ref={list} onScroll={onScroll}>
      {gap && <li className="gap">Some messages are missing.</li>}
      {messages.map(({ seq, payload, sender, at }) => <Line key={seq} text={payload.text} sender={sender} note={timeOf(at)} />)}
      {unsent.map(({ key, text, failure }) => (
        <Line key={key} text={text} sender={user} note={failure} status={failure ? 'failed' : 'pending'} />
      ))}
      {error && <li className="gap">{error.message}</li>}
    </ol>
  );
}

/** Who is typing: ephemeral messages, which are not in the log. */
function Typing() {
  const [typists, setTypists] = useState({}); // name -> when the sign is no longer shown
  const drop = (gone) => setTypists((present) => Object.fromEntries(Object.entries(present).filter(([name]) => name !== gone)));
  useSubscription(TYPING, ({ sender }) => setTypists((present) => ({ ...present, [sender]: performance.now() + TYPING_SHOWN })));
  useSubscription(ROOM, ({ sender }) => drop(sender));
  useEffect(() => {
    const timers = Object.entries(typists).map(([name, end]) => setTimeout(drop, end - performance.now(), name));
    return () => timers.forEach(clearTimeout);
  }, [typists]);
  return <p id="typing" role="status">{describeTypists(Object.keys(typists))}</p>;
}

function Chat() {
  const publish = usePublish();
  const [unsent, setUnsent] = useState([]); // {key, text, failure}
  const lastSign = useRef(-Infinity);
  useMembership();

  async function send(text) {
    const key = crypto.randomUUID();
    setUnsent((lines) => [...lines, { key, text }]);
    try {
      await publish(ROOM, { text }); // without a connection, it waits for one
      setUnsent((lines) => lines.filter((line) => line.key !== key));
    } catch ({ message }) {
      setUnsent((lines) => lines.map((line) => (line.key === key ? { ...line, failure: `not sent: ${message}` } : line)));
    }
  }

  function onInput() {
    if (performance.now() - lastSign.current < TYPING_INTERVAL) return;
    lastSign.current = performance.now();
    // `echo: false`: this page does not get it. Without a connection it is lost, and nobody misses it.
    publish(TYPING, true, { ephemeral: true, echo: false }).catch(() => {});
  }

  function onSubmit(event) {
    event.preventDefault();
    send(event.target.elements.text.value);
    event.target.reset();
    lastSign.current = -Infinity;
  }

  return (
    <main className="card">
      <People />
      <Messages unsent={unsent} />
      <Typing />
      <form id="send" onSubmit={onSubmit}>
        <input name="text" maxLength={1000} required placeholder="Message" autoComplete="off" aria-label="Message" onInput={onInput} />
        <button className="main">Send</button>
      </form>
    </main>
  );
}

showPage('Chat', <Chat />);
