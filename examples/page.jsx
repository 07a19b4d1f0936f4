// What all pages with React have around their content.

import { StrictMode } from 'react';
import { createRoot } from 'react-dom/client';
import { CatbusProvider, useConnectionState } from '@catbus/client/react';

import { bus, describeState } from './session.js';

function Page({ title, children }) {
  const state = useConnectionState();
  return (
    <>
      <header className="top">
        <h1>{title}</h1>
        <nav>
          <a href={`./${location.search}`}>HTML</a>
          <a aria-current="page">React</a>
          <a href="../" target="_top">All examples</a>
        </nav>
        <p id="state" role="status" data-state={state}>{describeState(state)}</p>
      </header>
      {children}
    </>
  );
}

/** Show a page, whose components may use all hooks. The provider connects the client. */
export function showPage(title, content) {
  createRoot(document.querySelector('#root')).render(
    <StrictMode>
      <CatbusProvider client={bus}>
        <Page title={title}>{content}</Page>
      </CatbusProvider>
    </StrictMode>,
  );
}
