"""A language model that knows one answer, with the streaming API of OpenAI's chat completions."""

import json
import os
import re
import time
from collections.abc import Iterator
from typing import Any

PACE = float(os.environ.get("TOKEN_SECONDS", "0.05"))
"""The time that it takes for a token, in seconds."""

TEXT = (
    "You asked: {question}. An honest answer takes a while, so here it comes, one piece after the other. Reload this "
    "page, close your laptop, or open the page on your phone: the text goes on where it is, because every piece is a "
    "message in the log, and your page resumes after the last one that it has seen. "
)
LENGTH = 2
"""How often it says so."""


def whole_answer(request: Any) -> str:
    """Return the answer to the last message of a request, without streaming."""
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": _text(request)}}]})


def chunks(request: Any) -> Iterator[bytes]:
    """Yield the server-sent events of the same answer. Blocks between them."""
    for word in re.findall(r"\S+ ?", _text(request)):
        yield _event({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
        time.sleep(PACE)
    yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    yield b"data: [DONE]\n\n"


def _text(request: Any) -> str:
    return TEXT.format(question=request["messages"][-1]["content"]) * LENGTH


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps({"object": "chat.completion.chunk", **value}).encode() + b"\n\n"
