"""The pages of the documentation site, from the Markdown files of the project.

    python -m tests.documentation_site build/docs

GitHub shows these files where they are, so their links lead to files of the project. On the site each is a page with a
name of its own, and other files that a page links to are copied beside it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
    "clients/javascript/README.md": "javascript-client.md",
    "examples/README.md": "examples.md",
    "k8s/README.md": "kubernetes.md",
    "protocol/README.md": "protocol.md",
    "bench/README.md": "running-benchmarks.md",
}
"""The files outside of `docs/` that are pages, and the names of these pages."""

SETTINGS = "settings.md"
"""The page with the whole of catbus.toml."""

_LINK = re.compile(r"(?P<text>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?![a-z]+:)(?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")
_FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
_LABEL = re.compile(r"\A( *```\w+) .*$", re.MULTILINE)
"""What stands after the language of a block: a mark for the tests. The site generator would take the block for text."""


def main() -> None:
    directory = Path(sys.argv[1])
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for source, name in page_names().items():
        text = (ROOT / source).read_text(encoding="utf-8")
        (directory / name).write_text(rewrite_links(text, source, directory), encoding="utf-8")
    for asset in (ROOT / "docs" / "site").iterdir():
        shutil.copyfile(asset, directory / asset.name)
    settings = (ROOT / "catbus.toml").read_text(encoding="utf-8")
    (directory / SETTINGS).write_text(f"# Settings\n\n```toml\n{settings}```\n", encoding="utf-8")


def build_site(directory: Path) -> Path:
    """Build the site below a directory, as `make docs` does, and return its directory.

    The generator checks each link and each anchor: a warning of it fails the build.
    """
    configuration = directory / "zensical.toml"
    shutil.copyfile(ROOT / configuration.name, configuration)
    for command in (
        ["-m", "tests.documentation_site", str(directory / "build" / "docs")],
        ["-m", "zensical", "build", "--strict", "--config-file", str(configuration)],
    ):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return directory / "build" / "site"


def page_names() -> dict[str, str]:
    """Return the name of each page by the path of its file in the project."""
    return PAGES | {str(path.relative_to(ROOT)): path.name for path in sorted((ROOT / "docs").glob("*.md"))}


def rewrite_links(text: str, source: str, directory: Path) -> str:
    """Make the links of a file lead to pages of the site. Copy other files that it links to into `directory`.

    A link to a directory becomes its text alone.
    """
    names = page_names() | {"catbus.toml": SETTINGS}

    def rewrite(link: re.Match[str]) -> str:
        if not link["target"]:
            return link[0]
        found = (ROOT / source).parent.joinpath(link["target"]).resolve().relative_to(ROOT)
        if (ROOT / found / "README.md").is_file():
            found = found / "README.md"
        if (name := names.get(str(found))) is None:
            if (ROOT / found).is_dir():
                return link["text"].lstrip("!")[1:-1]
            name = f"files/{found}" + ".txt" * (found.suffix in ("", ".md"))
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / found, directory / name)
        return f"{link['text']}({name}{link['anchor'] or ''})"

    parts = _FENCE.split(text)
    return "".join(
        _LABEL.sub(r"\1", part) if index % 2 else _LINK.sub(rewrite, part).replace("<details>", "<details markdown>")
        for index, part in enumerate(parts)
    )


if __name__ == "__main__":
    main()
