"""The format and the levels of log lines, and the redaction of secrets."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catbus.cli import log_redaction
from catbus.cli.log_configuration import configure_logging
from catbus.cli.log_redaction import redact_text
from catbus.observability.loggers import get_logger

TOKEN = "sub-eyJjbGllbnRfaWQiOiJhIn0.c2lnbmF0dXJlc2lnbmF0dXI"
SECRET = "correct horse battery staple"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def logged(levels: str = "debug") -> tuple[io.StringIO, Any]:
    stream = io.StringIO()
    configure_logging(levels, "auto", stream, secrets=[SECRET])
    return stream, get_logger("catbus.test")


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_output_that_is_no_terminal_gets_json() -> None:
    stream, logger = logged()
    logger.info("serving", urls=["ws://127.0.0.1:1/ws"])
    logging.getLogger("other").warning("%s is odd", "this")
    ours, theirs = lines(stream)
    assert ours["timestamp"].endswith("Z")
    assert {**ours, "timestamp": ""} == {
        "event": "serving",
        "level": "info",
        "logger": "catbus.test",
        "timestamp": "",
        "urls": ["ws://127.0.0.1:1/ws"],
    }
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("this is odd", "warning", "other")


def test_terminal_gets_text() -> None:
    stream = Terminal()
    configure_logging("info", "auto", stream)
    get_logger("catbus.test").info("serving", port=1)
    assert "serving" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def test_exception_is_one_line_of_json_and_text_on_a_terminal() -> None:
    stream, logger = logged()
    terminal = Terminal()
    try:
        raise ValueError(f"token={TOKEN}")
    except ValueError:
        logger.exception("odd")
        configure_logging("debug", "auto", terminal)
        logger.exception("odd")
    [line] = lines(stream)
    assert "Traceback" in line["exception"] and "Traceback" in terminal.getvalue()
    assert TOKEN not in stream.getvalue() + terminal.getvalue()


def test_level_applies_to_all_loggers_below_a_name() -> None:
    stream, _ = logged("catbus=info,catbus.log=error,aioquic=debug")
    for name in ("catbus", "catbus.replica", "catbus.log", "catbus.log.in_memory", "quic", "other"):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger(name).log(level, "x")
    heard: dict[str, list[str]] = {}
    for line in lines(stream):
        heard.setdefault(line["logger"], []).append(line["level"])
    assert heard == {
        "catbus": ["info", "warning", "error"],
        "catbus.replica": ["info", "warning", "error"],
        "catbus.log": ["error"],
        "catbus.log.in_memory": ["error"],
        "quic": ["debug", "info", "warning", "error"],
        "other": ["warning", "error"],
    }


def test_level_off_disables_a_logger() -> None:
    stream, logger = logged("off")
    logger.critical("x")
    assert not stream.getvalue()


def test_secrets_are_redacted_from_lines() -> None:
    stream, logger = logged()
    logger.info(f"took {TOKEN}", token="plain", nested={"admin_key": "hunter2", "deep": [{"password": "hunter2"}]})
    logger.info("using " + SECRET, value=SECRET, raw=SECRET.encode(), odd=object, error=ValueError(SECRET))
    logger.info("connecting", url="postgres://me:hunter2@db/catbus?sslmode=require&password=hunter2")
    logger.info("request", headers={"Authorization": "Bearer hunter2"}, line="Authorization: Bearer hunter2")
    logger.info("environment", text="CATBUS_SECRET=hunter2 PGPASSWORD=hunter2")
    logging.getLogger("other").info("token: %s", "hunter2")
    for secret in (TOKEN, SECRET, "hunter2", "plain"):
        assert secret not in stream.getvalue()
    assert "postgres://me:***@db/catbus?sslmode=require&password=***" in stream.getvalue()


@pytest.mark.parametrize(
    "harmless",
    [
        "the token has expired",
        "unauthenticated (token_expired)",
        "sub-project.updates",
        "ws://127.0.0.1:8080/ws",
        "postgres://db:5432/catbus",
        "role-play",
    ],
)
def test_text_that_is_no_secret_stays(harmless: str) -> None:
    assert redact_text(harmless) == harmless


@pytest.mark.parametrize(
    "secret", [TOKEN, "role-AAAAAAAAAAAAAAAAAAAAAA", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"]
)
def test_every_kind_of_token_is_redacted(secret: str) -> None:
    assert secret not in redact_text(f"this is {secret}, is it not?")


# With IGNORECASE, the long s is an `s`.
SECRETS = "sub-abcdefgh12345678.c ROLE-abcdefgh12345678 eyJab.cd.ef ://x:y@ Token=z pASSwd:w API_KEY=v \u017fecret=u"
PARTS = [*SECRETS.split(), "apikey:q", "BEARER x", "basic y", " ", "sub-", "."]


@given(st.lists(st.sampled_from(PARTS)).map("".join))
def test_quick_look_for_suspicious_text_passes_over_no_secret(text: str) -> None:
    expected = text
    for pattern, instead in log_redaction._SECRET_PATTERNS:
        expected = pattern.sub(instead, expected)
    assert redact_text(text) == expected


def test_embedding_program_configures_its_own_logging(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    get_logger("catbus.test").warning("odd", port=1)
    [record] = caplog.records
    assert (record.getMessage(), record.name, vars(record)["port"]) == ("odd", "catbus.test", 1)
    assert capsys.readouterr().out == ""
