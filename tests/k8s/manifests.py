"""The manifests as `kubectl kustomize` renders them, and the schemas that they must satisfy."""

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
"""Schemas of custom resources: as strict as those of Kubernetes, with the fields that the manifests use."""
OLDEST = "1.28"
VERSIONS = OLDEST, kubernetes_validate.latest_version()

Document = dict[str, Any]


def kustomizations() -> list[str]:
    """The paths below `k8s/` that can be applied."""
    return ["base", *sorted(f"overlays/{each.name}" for each in (MANIFESTS / "overlays").iterdir())]


def program(name: str) -> Path:
    """The path of a program that a wheel installed."""
    return Path(sysconfig.get_path("scripts")) / name


@cache
def _render(place: str) -> str:
    command: list[str | Path] = [program("kubectl"), "kustomize", str(MANIFESTS / place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "kubectl warns of deprecated fields"
    return done.stdout


def render(place: str) -> list[Document]:
    """The documents of a kustomization. Each call returns new ones, which the caller may change."""
    return [document for document in yaml.safe_load_all(_render(place)) if document]


def validate(document: Document, version: str) -> None:
    """Raise unless the schema of its kind in this version of Kubernetes allows the document, without unknown fields."""
    crd = CRDS / f"{document['kind']}.json"
    if crd.exists():
        jsonschema.validate(document, json.loads(crd.read_text()))
    else:
        kubernetes_validate.validate(document, version, strict=True)


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def find_document(documents: list[Document], kind: str, name: str) -> Document:
    [found] = [document for document in of_kind(documents, kind) if document["metadata"]["name"] == name]
    return found
