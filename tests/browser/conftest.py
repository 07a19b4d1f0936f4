"""Fixtures that run every test of this folder in Chromium and in Firefox. Each browser starts once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser.driver import PROGRAMS, Browser, open_browser


@pytest.fixture(scope="session", params=PROGRAMS)
def running_browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    with open_browser(request.param) as browser:
        yield browser


@pytest.fixture
def browser(running_browser: Browser) -> Browser:
    """A browser with a new page."""
    running_browser.open_page()
    return running_browser
