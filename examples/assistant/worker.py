"""A worker that has a language model answer questions, and publishes the answers while they are written. Run one.

The retained message of `answers.USER.NUMBER` is the state of an answer. The pieces of its text are messages of
`tokens.USER.NUMBER`. All channels have one order, so a page that reads "writing" gets all pieces after the seq of that
message, and none twice.
"""

import json
import os
from typing import Any

import httpx
import trio

import catbus

MODEL = os.environ["MODEL_URL"]


class Draft:
    """A text that grows."""

    def __init__(self) -> None:
        self.text = ""
        self.ended = False
        self.changed = trio.Event()

    def change(self, more: str = "", *, ended: bool = False) -> None:
        self.text += more
        self.ended |= ended
        self.changed.set()


async def read_answer(question: str, draft: Draft) -> None:
    """Add what the model says to a draft, until it has ended. Cancelling it ends the model's work, too."""
    request = {"model": "any", "stream": True, "messages": [{"role": "user", "content": question}]}
    async with httpx.AsyncClient(timeout=30) as client, client.stream("POST", MODEL, json=request) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                [choice] = json.loads(line.removeprefix("data: "))["choices"]
                draft.change(choice["delta"].get("content", ""))


async def publish_pieces(bus: catbus.Bus, channel: str, draft: Draft) -> None:
    """Publish a draft while it grows. What comes during a publish goes with the next one."""
    published = 0
    while not draft.ended or published < len(draft.text):
        await draft.changed.wait()
        draft.changed = trio.Event()
        piece = draft.text[published:]
        if piece:
            published += len(piece)
            await bus.publish(channel, piece)


async def answer(bus: catbus.Bus, channel: str, asked: catbus.Message, cancelling: trio.CancelScope) -> None:
    """Answer one question."""
    question = asked.payload["question"]

    async def tell(state: str, text: str = "") -> int | None:
        return await bus.publish(channel, {"question": question, "text": text, "state": state}, retain=True)

    draft, state = Draft(), "done"
    await tell("writing")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish_pieces, bus, tokens_of(channel), draft)
        with cancelling:
            try:
                await read_answer(question, draft)
            except httpx.HTTPError:
                state = "failed"
        draft.change(ended=True)
    await tell("cancelled" if cancelling.cancelled_caught else state, draft.text)


async def end_interrupted(bus: catbus.Bus, channel: str, left: Any) -> None:
    """End what a worker before this one has not ended, because it has died. Its pieces are in the log."""
    page = await bus.history(tokens_of(channel), limit=1000)
    text = "".join(message.payload for message in page.messages)
    await bus.publish(channel, {**left, "text": text, "state": "interrupted"}, retain=True)


def tokens_of(channel: str) -> str:
    return "tokens." + channel.partition(".")[2]


async def main() -> None:
    async with (
        catbus.connect(os.environ["CATBUS_URL"], token=os.environ["CATBUS_TOKEN"]) as bus,
        bus.retained("answers.*") as answers,
        trio.open_nursery() as nursery,
    ):
        writing: dict[str, trio.CancelScope] = {}
        changes = answers.changes()

        def handle(channel: str, message: catbus.Message) -> None:
            match message.payload["state"]:
                case "asked":
                    writing[channel] = trio.CancelScope()
                    nursery.start_soon(answer, bus, channel, message, writing[channel])
                case "cancelling" if channel in writing:
                    writing[channel].cancel()
                case "writing" | "cancelling" if channel not in writing:
                    nursery.start_soon(end_interrupted, bus, channel, message.payload)

        for channel, message in dict(answers).items():
            handle(channel, message)
        async for change in changes:
            if change.value is not None:
                handle(change.key, change.value)


if __name__ == "__main__":
    trio.run(main)
