"""The configuration of logging: output, format and levels. A program that embeds Catbus configures its own."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TextIO

import structlog
from structlog.typing import Processor

from ..config import parse_levels
from .line_writer import OutputWriter, writer_of
from .log_redaction import redact_events

# The loggers of some libraries have other names than the library.
_ALIASES = {"aioquic": ("quic", "http3"), "trio_websocket": ("trio-websocket",)}

LINES_DROPPED = "log lines were dropped, because the output was not read"


def configure_logging(levels: str, form: str, stream: TextIO, *, secrets: Iterable[str] = ()) -> None:
    """Write all log lines to `stream`, without waiting for its reader: see `LineWriter`.

    `levels` is text like "catbus=info,aioquic=warning". Other loggers have the level `warning`. `form` is "text",
    "json", or "auto": text on a terminal. `secrets`, and text that looks like a secret, are redacted.
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
    """Formats records in the calling thread, and passes the lines to a writer."""

    def __init__(self, writer: OutputWriter) -> None:
        super().__init__()
        self._writer = writer
        writer.replace_notice(self._format_notice)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._line(record)
        except Exception as error:  # noqa: BLE001 (logging does the same, but reports it on stderr, which can block)
            line = self._line(
                _make_record(record.name, f"a log line has no text: {type(error).__name__}", place=record.msg)
            )
        self._writer.put(line)

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")

    def _format_notice(self, number: int) -> bytes:
        return self._line(_make_record("catbus.logs", LINES_DROPPED, number=number))


def _make_record(name: str, text: str, **values: object) -> logging.LogRecord:
    record = logging.LogRecord(name, logging.WARNING, "", 0, text, None, None)
    vars(record).update(values)
    return record


def set_levels(levels: str) -> None:
    """Set the level of each logger. The levels of an earlier call are reset."""
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
"""Loggers whose level was set."""
