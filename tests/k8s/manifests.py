"""What `kubectl kustomize` makes of the manifests, and the schemas that it has to satisfy."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "k8s"
CRDS = Path(__file__).parent / "crds"
"""Schemas of kinds that are not Kubernetes' own: as strict as those, and with what we use."""
OLDEST = "1.28"
VERSIONS = OLDEST, kubernetes_validate.latest_version()

Document = dict[str, Any]


def kustomizations() -> list[str]:
    """What can be applied, by its place below `k8s/`."""
    return ["base", *sorted(f"overlays/{each.name}" for each in (MANIFESTS / "overlays").iterdir())]


def program(name: str) -> Path:
    """A program that came in a wheel."""
    return Path(sysconfig.get_path("scripts")) / name


@cache
def _render(place: str) -> str:
    command = [program("kubectl"), "kustomize", str(MANIFESTS / place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "it warns of what will not be understood any more"
    return done.stdout


def render(place: str) -> list[Document]:
    """The documents of a kustomization; the caller's own, to be changed."""
    return [document for document in yaml.safe_load_all(_render(place)) if document]


def validate(document: Document, version: str) -> None:
    """Raise unless the schema of its kind in this version of Kubernetes allows it, with no field that is not known."""
    crd = CRDS / f"{document['kind']}.json"
    if crd.exists():
        jsonschema.validate(document, json.loads(crd.read_text()))
    else:
        kubernetes_validate.validate(document, version, strict=True)


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def named(documents: list[Document], kind: str, name: str) -> Document:
    [found] = [document for document in of_kind(documents, kind) if document["metadata"]["name"] == name]
    return found
