"""Settings from the environment: which variables there are, what their text means, and which are misspelt."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_origin

from .log_levels import parse_levels
from .value_types import Count, Duration, LogSize, Size, Switch, Timeout

SHORT = {
    "DATABASE_URL": "database.url",
    "CATBUS_LISTEN_URL": "database.listen_url",
    "CATBUS_SECRET": "auth.secret",
    "CATBUS_ADMIN_KEY": "auth.admin_key",
    "CATBUS_WS_BIND": "websocket.bind",
    "CATBUS_WS_TLS": "websocket.tls",
    "CATBUS_TRUSTED_PROXIES": "websocket.trusted_proxies",
    "CATBUS_BIND": "webtransport.bind",
    "CATBUS_CERT": "webtransport.cert",
    "CATBUS_KEY": "webtransport.key",
    "RUST_LOG": "logging.levels",
    "CATBUS_LOG": "logging.levels",
}
"""Short names of the settings that are set most."""

OF_CLIENTS = frozenset({"CATBUS_URL", "CATBUS_FALLBACK_URL", "CATBUS_TOKEN"})
"""Variables of the client commands, which are no settings of a broker."""

_SHORTEST_OF_SEVERAL = 16
_NUMBER = re.compile(r"[+-]?\d+(?P<fraction>\.\d+)?")
_NUMBERS = Duration, Timeout, Size, LogSize, Count
# Kubernetes tells each container of the Services beside it, so one called `catbus` sets CATBUS_PORT and others.
_OF_KUBERNETES = re.compile(r"CATBUS\w*_(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")


def variable(name: str) -> str:
    """The variable for any setting: `CATBUS_LIMITS_CONNECTIONS` for `limits.connections`."""
    return f"CATBUS_{name.upper().replace('.', '_')}"


def variables(names: Iterable[str]) -> dict[str, str]:
    """Every variable with its setting, for settings of these `names`. Of two for one setting, the later wins."""
    return SHORT | {variable(name): name for name in names}


def parse_variable(name: str, kind: Any, text: str) -> object:
    """What `text` stands for, as the value would be in a file. `kind` is the type of the setting `name`."""
    if name == "auth.secret":
        return _secrets(text)
    if get_origin(kind) is tuple:
        return _list(text)
    if kind == Switch:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in _NUMBERS and (number := _NUMBER.fullmatch(text)):
        return float(text) if number["fraction"] else int(text)
    return text


def known_directives(text: str) -> str:
    """The part of a RUST_LOG that names log levels; the rest was written for another program and is no mistake."""
    kept = []
    for directive in text.replace("::", ".").split(","):
        try:
            parse_levels(directive)
        except ValueError:
            continue
        kept.append(directive.strip())
    return ",".join(kept) or "catbus=info"


def find_misspelt(environ: Mapping[str, str], known: Iterable[str]) -> Iterator[str]:
    """A sentence for each variable that looks like one of Catbus and means nothing. Values are not shown."""
    meant = {*known, *OF_CLIENTS}
    # The prefix that all have would make any two of them alike.
    endings = {name.removeprefix("CATBUS_"): name for name in sorted(meant)}
    for name in sorted(environ):
        if not name.upper().startswith("CATBUS_") or name in meant or _is_of_kubernetes(name, environ[name]):
            continue
        close = difflib.get_close_matches(name.upper().removeprefix("CATBUS_"), endings, n=1)
        guess = f" (did you mean {endings[close[0]]}?)" if close else ""
        yield f"{name} is not a known variable and has no effect{guess}"


def _secrets(text: str) -> list[str]:
    # A comma may well stand in a secret that is in use. Only where every part would do as a secret are they
    # several, and then the whole still verifies.
    parts = [part.strip() for part in text.split(",")]
    several = len(parts) > 1 and all(len(part) >= _SHORTEST_OF_SEVERAL for part in parts)
    return [*parts, text] if several else [text]


def _list(text: str) -> object:
    # "[]" is the only way to say that there are none: an empty variable is not set. "[::1]:8080" is no TOML.
    if text.startswith("["):
        try:
            return tomllib.loads(f"list = {text}")["list"]
        except tomllib.TOMLDecodeError:
            pass
    return [part.strip() for part in text.split(",")]


def _is_of_kubernetes(name: str, value: str) -> bool:
    return _OF_KUBERNETES.fullmatch(name) is not None or (name.endswith("_PORT") and "://" in value)
