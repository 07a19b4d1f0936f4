"""A short form of `make check-api`: all requests that follow from the document itself, and a few others, which are the
same each time."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from catbus.endpoints.http.http_request import HttpRequest
from catbus.endpoints.http.http_response import HttpResponse, text_response
from catbus.endpoints.http.routes import ROUTES
from catbus.endpoints.replica_interface import ReplicaInterface
from tests.openapi.__main__ import check


async def test_broker_answers_as_its_document_says() -> None:
    status, output = await check(3, "--generation-deterministic")
    found = re.search(r"^  (\d+) generated, (\d+) passed", output, re.MULTILINE)
    assert status == 0, output
    assert found is not None
    assert found[1] == found[2]
    assert int(found[1]) > 10 * len(ROUTES)


async def test_answer_that_is_not_in_the_document_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def teapot(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
        return text_response(418)

    monkeypatch.setitem(ROUTES, "/ready", {"GET": replace(ROUTES["/ready"]["GET"], handler=teapot)})
    status, output = await check(1, "--include-path", "/ready", "--phases", "fuzzing")
    assert status == 1
    assert "Received: 418" in output, output
