// What the theme leaves out for keyboards and screen readers: wide tables can be scrolled by keys, and the buttons of a
// block of code are no landmark of the page.
function amend() {
  for (const table of document.querySelectorAll('.md-typeset__scrollwrap')) table.tabIndex = 0;
  for (const buttons of document.querySelectorAll('.md-code__nav')) buttons.setAttribute('role', 'none');
}

amend();
new MutationObserver(amend).observe(document.body, { childList: true, subtree: true });
