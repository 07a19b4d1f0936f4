"""Directories whose content is swapped as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


class Volume:
    """A directory as the kubelet mounts a Secret: what it holds changes by one link that is swapped."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._count = 0
        directory.mkdir(exist_ok=True)

    def put(self, content: Mapping[str, bytes]) -> None:
        self._count += 1
        data = self.directory / f"..{self._count}"
        data.mkdir()
        for name, value in content.items():
            (data / name).write_bytes(value)
            with suppress(FileExistsError):
                (self.directory / name).symlink_to(Path("..data") / name)
        link = self.directory / "..data.new"
        link.symlink_to(data.name)
        link.rename(self.directory / "..data")
