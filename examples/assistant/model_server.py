"""A language model that knows one answer, with the streaming API of OpenAI's chat completions."""

import json
import os
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


def chunks(request: Any) -> Iterator[bytes]:
    """Yield the server-sent events of an answer to the last message of a request. Blocks between them."""
    question = request["messages"][-1]["content"]
    text = TEXT.format(question=question) * LENGTH
    for word in text.split(" "):
        yield _event({"choices": [{"index": 0, "delta": {"content": f"{word} "}, "finish_reason": None}]})
        time.sleep(PACE)
    yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    yield b"data: [DONE]\n\n"


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps({"object": "chat.completion.chunk", **value}).encode() + b"\n\n"
