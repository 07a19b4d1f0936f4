"""What axe finds on the pages of the documentation site.

python -m tests.browser.test_documentation_site     every page
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import pytest
import trio

from tests.browser.driver import Browser, open_browser
from tests.browser.test_console import AXE
from tests.documentation_site import build_site

SAMPLE = ("index.html", "console.html", "guarantees.html", "operations.html", "webhooks.html")
"""Pages that have, together, all kinds of content: images, wide tables, code, diagrams, and what is folded away."""

AUDIT = "return (await axe.run()).violations.map(({ id, nodes }) => [id, nodes.map(({ html }) => html)])"
PALETTES = {"default": "__palette_0", "slate": "__palette_1"}
"""The light one and the dark one, with the inputs that choose them. The site remembers the choice."""


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served_site() -> Iterator[tuple[str, list[str]]]:
    """Build the site and serve it. Yields its URL and the names of its pages."""
    with TemporaryDirectory() as directory:
        site = build_site(Path(directory))
        with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site))) as server:
            Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}", sorted(path.name for path in site.glob("*.html"))
            server.shutdown()


async def audit(browser: Browser, url: str, names: Sequence[str]) -> AsyncGenerator[tuple[str, str, list[Any]], None]:
    """Yield what is found on each page, first in the light palette, then in the dark one."""
    axe = AXE.read_text(encoding="utf-8")
    for palette, choice in PALETTES.items():
        await browser.goto(f"{url}/{names[0]}")
        await browser.run("document.getElementById(args[0]).click()", choice)
        for name in names:
            await browser.goto(f"{url}/{name}")
            assert await browser.run("return document.body.dataset.mdColorScheme") == palette
            await browser.run(axe)
            yield name, palette, await browser.run(AUDIT)


@pytest.mark.parametrize("running_browser", ["chromium"], indirect=True)
async def test_axe_finds_nothing_on_the_site(browser: Browser) -> None:
    with served_site() as (url, names):
        assert set(SAMPLE) <= set(names)
        async with aclosing(audit(browser, url, SAMPLE)) as audited:
            async for name, palette, found in audited:
                assert found == [], (name, palette)


async def audit_all() -> int:
    """Print what is found on each page. Return the number of findings."""
    count = 0
    with served_site() as (url, names), open_browser("chromium") as browser:
        browser.open_page()
        async with aclosing(audit(browser, url, names)) as audited:
            async for name, palette, found in audited:
                count += len(found)
                print(name, palette, *found or ["nothing"])
    return count


if __name__ == "__main__":
    sys.exit(trio.run(audit_all) > 0)
