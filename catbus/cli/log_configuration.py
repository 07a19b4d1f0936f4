"""Where log lines go and how they look. Only the command calls this; a program that embeds Catbus has its own way."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from ..config import parse_levels
from .line_writer import LineWriter, writer_of

# What a library is called and what its loggers are called is not always the same.
_ALIASES = {"aioquic": ("quic", "http3"), "trio_websocket": ("trio-websocket",)}

LINES_DROPPED = "log lines were dropped, because the output was not read"


def configure_logging(levels: str, form: str, stream: TextIO, *, secrets: Iterable[str] = ()) -> None:
    """Send all log lines to `stream`. No program waits for its reader: see `LineWriter`.

    `levels` is such as "catbus=info,aioquic=warning"; who is not named there says warnings only. `form` is "text",
    "json", or "auto": text on a terminal. `secrets` are blotted out wherever they occur, and so is what looks like one.
    """
    terminal = stream.isatty()
    renderer: Processor = structlog.processors.JSONRenderer()
    if form == "text" or (form == "auto" and terminal):
        renderer = structlog.dev.ConsoleRenderer(
            colors=terminal, exception_formatter=structlog.dev.plain_traceback, pad_event_to=24
        )
    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    writer = writer_of(stream)
    handler = logging.StreamHandler(stream) if writer is None else _LineHandler(writer)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=common,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                redact_events(secrets),
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_levels(levels)


class _LineHandler(logging.Handler):
    """Formats records where they are made, and leaves the lines to a writer."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer
        writer.report = self._report

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._line(record)
        except Exception as error:  # noqa: BLE001 (logging does the same, but says it to a stderr that may block)
            line = self._line(
                _make_record(record.name, f"a log line has no text: {type(error).__name__}", place=record.msg)
            )
        self._writer.put(line)

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")

    def _report(self, number: int) -> bytes:
        return self._line(_make_record("catbus.logs", LINES_DROPPED, number=number))


def _make_record(name: str, text: str, **values: object) -> logging.LogRecord:
    record = logging.LogRecord(name, logging.WARNING, "", 0, text, None, None)
    vars(record).update(values)
    return record


def set_levels(levels: str) -> None:
    """Let each logger say what `levels` has for it, in place of what an earlier call had."""
    for name in _configured_loggers:
        logging.getLogger(name).setLevel(logging.NOTSET)
    _configured_loggers.clear()
    wanted = parse_levels(levels)
    logging.getLogger().setLevel(wanted.pop("", logging.WARNING))
    for name, level in wanted.items():
        for each in (name, *_ALIASES.get(name, ())):
            logging.getLogger(each).setLevel(level)
            _configured_loggers.add(each)


_configured_loggers: set[str] = set()
"""Loggers with a level of their own."""


_FIRST_KEYS = ("timestamp", "level", "logger", "event")
_SECRET_KEY = re.compile(r"secret|token|passw|admin_?key|api_?key|authorization|cookie|credential", re.IGNORECASE)
_SECRET_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b(sub|role)-[\w-]{16,}(?:\.[\w-]*)?"), r"\1-***"),
    (re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]*"), "eyJ***"),
    (re.compile(r"\b(Bearer|Basic)\s+\S+", re.IGNORECASE), r"\1 ***"),
    (re.compile(r"(://[^\s/:@]*):[^\s/]*@"), r"\1:***@"),
    (re.compile(r"(\w*(?:secret|token|passw(?:or)?d|api_?key)\w*[\"']?\s*[=:]\s*)[^\s&;,]+", re.IGNORECASE), r"\1***"),
)


def redact_events(secrets: Iterable[str]) -> Callable[[WrappedLogger, str, EventDict], EventDict]:
    """A processor that hides `secrets`, what stands under a telling key, and what has the form of a token."""
    known = sorted({secret for secret in secrets if secret}, key=len, reverse=True)

    def hide(key: str, value: object) -> object:
        match value:
            case str():
                return "***" if key and _SECRET_KEY.search(key) else redact_text(value, known)
            case bytes():
                return hide(key, value.decode(errors="replace"))
            case dict():
                return {each: hide(str(each), inner) for each, inner in value.items()}
            case list() | tuple() | set() | frozenset():
                return [hide(key, inner) for inner in value]
            case None | bool() | int() | float():
                return value
            case _:
                return redact_text(str(value), known)

    def process(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        # What every line has comes first, in the same order.
        keys = [key for key in _FIRST_KEYS if key in event] + [key for key in event if key not in _FIRST_KEYS]
        return {key: hide("" if key in ("event", "exception") else key, event[key]) for key in keys}

    return process


def redact_text(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without what looks like a token or a password, and without `secrets`."""
    for secret in secrets:
        text = text.replace(secret, "***")
    for pattern, instead in _SECRET_PATTERNS:
        text = pattern.sub(instead, text)
    return text
