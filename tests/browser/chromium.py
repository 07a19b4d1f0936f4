"""A driver of pages in Chromium. It reads commands as lines of JSON from stdin and writes a reply to each to stdout.

It is a process of its own because Playwright needs an asyncio loop of its own.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from playwright.sync_api import Error, Page, sync_playwright

BACKGROUND_OFF = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def main(path: str, any_certificate: str = "") -> None:
    with sync_playwright() as playwright:
        # Chromium cannot run as root with its sandbox.
        browser = playwright.chromium.launch(
            executable_path=path, args=[*BACKGROUND_OFF, *([] if os.geteuid() else ["--no-sandbox"])]
        )
        ignore_https_errors = bool(any_certificate)
        page = browser.new_page(ignore_https_errors=ignore_https_errors)
        for line in sys.stdin:
            request = json.loads(line)
            if request["command"] == "open":
                page.close()
                page = browser.new_page(ignore_https_errors=ignore_https_errors)
                print('{"result": null}', flush=True)
                continue
            try:
                reply: Any = {"result": execute(page, **request)}
            except Error as error:
                reply = {"error": str(error)}
            print(json.dumps(reply), flush=True)
        browser.close()


def execute(page: Page, command: str, text: str, arguments: list[Any]) -> Any:
    if command == "goto":
        page.goto(text)
        return None
    return page.evaluate(f"async (args) => {{ {text} }}", arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
