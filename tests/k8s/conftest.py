"""The fixture that the tests of the manifests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.k8s.image import install_image


@pytest.fixture(scope="session")
def image() -> Iterator[Path]:
    """A directory with the contents of the image's `/opt/catbus`."""
    with install_image() as directory:
        yield directory
