"""The container's image without a container engine: the steps of its Dockerfile, run in a temporary directory."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from tests.k8s.manifests import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instructions(name: str) -> list[str]:
    """The instructions with this name, each on one line."""
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE)
    return [line.partition(" ")[2] for line in joined.splitlines() if line.startswith(f"{name} ")]


def build_context() -> list[Path]:
    """The files below the root that `.dockerignore` permits."""
    allowed: set[Path] = set()
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            place = ROOT / line[1:]
            allowed |= {file for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file()}
    return [file for file in sorted(allowed) if not any(fnmatch(part, "__pycache__") for part in file.parts)]


@contextmanager
def install_image() -> Iterator[Path]:
    """A directory with the contents of the image's `/opt/catbus`, made by the steps of the Dockerfile."""
    with tempfile.TemporaryDirectory(prefix="catbus-image-") as name:
        directory = Path(name)
        source, target = directory / "src", directory / "catbus"
        for file in build_context():
            copy = source / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
        for step in instructions("RUN"):
            if "/opt/catbus" in step:
                script = step.replace("/opt/catbus", str(target)).replace("/src", str(source))
                script = re.sub(r"^python ", f"{sys.executable} ", script)
                subprocess.run(["/bin/sh", "-euc", script], check=True, stdout=subprocess.DEVNULL)
        # Another user runs the programs in it.
        directory.chmod(0o755)
        yield target
