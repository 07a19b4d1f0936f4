"""The documentation site: it has every page, and no link that leads nowhere."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.documentation_site import ROOT, SETTINGS, build_site, page_names, rewrite_links

CONFIGURATION = ROOT / "zensical.toml"
UNLISTED = {"running-benchmarks.md"}
"""Pages that others link to, and that have no place of their own in the navigation."""


def navigation(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    found = entry.values() if isinstance(entry, dict) else entry
    return [name for each in found for name in navigation(each)]


def test_every_page_is_in_the_navigation_once() -> None:
    listed = navigation(tomllib.loads(CONFIGURATION.read_text(encoding="utf-8"))["project"]["nav"])
    assert sorted(listed) == sorted({*page_names().values(), SETTINGS} - UNLISTED)


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](../README.md#install)", "[a](index.md#install)"),
        ("[a](http.md)", "[a](http.md)"),
        ("[a](#here)", "[a](#here)"),
        ("[a](https://example.com/x.md)", "[a](https://example.com/x.md)"),
        ("[a](../k8s/)", "[a](kubernetes.md)"),
        ("[a](../tests/)", "a"),
        ("[`a`](../catbus.toml)", "[`a`](settings.md)"),
        ("[a](../catbus/broker.py)", "[a](files/catbus/broker.py)"),
        ("```sh x\n[a](../README.md)\n```\n", "```sh\n[a](../README.md)\n```\n"),
    ],
)
def test_links_lead_to_pages_of_the_site(link: str, expected: str, tmp_path: Path) -> None:
    assert rewrite_links(link, "docs/console.md", tmp_path) == expected
    assert (tmp_path / "files/catbus/broker.py").exists() is ("broker.py" in link)


def test_site_is_built_without_a_warning(tmp_path: Path) -> None:
    assert (build_site(tmp_path) / "index.html").is_file()
