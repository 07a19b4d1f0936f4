"""Drives pages of Chromium by lines of JSON on stdin, and answers each on stdout.

A process of its own: Playwright wants an asyncio loop that nobody else has a hand in.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from playwright.sync_api import Error, Page, sync_playwright

QUIET = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def main(path: str, any_certificate: str = "") -> None:
    with sync_playwright() as playwright:
        # Chromium as root has no sandbox.
        browser = playwright.chromium.launch(
            executable_path=path, args=[*QUIET, *([] if os.geteuid() else ["--no-sandbox"])]
        )
        trusting = bool(any_certificate)
        page = browser.new_page(ignore_https_errors=trusting)
        for line in sys.stdin:
            request = json.loads(line)
            if request["what"] == "open":
                page.close()
                page = browser.new_page(ignore_https_errors=trusting)
                print('{"result": null}', flush=True)
                continue
            try:
                answer: Any = {"result": carry_out(page, **request)}
            except Error as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)
        browser.close()


def carry_out(page: Page, what: str, text: str, arguments: list[Any]) -> Any:
    if what == "goto":
        page.goto(text)
        return None
    return page.evaluate(f"async (args) => {{ {text} }}", arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
