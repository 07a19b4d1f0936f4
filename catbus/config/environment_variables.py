"""Environment variables: their names, the parsing of their text, and warnings about unknown ones."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_origin

from .log_levels import parse_levels
from .value_types import Count, Duration, LogSize, Size, Switch, Timeout, Workers

SHORT_VARIABLES = {
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
"""Short names of the most frequent settings."""

CLIENT_VARIABLES = frozenset({"CATBUS_URL", "CATBUS_FALLBACK_URL", "CATBUS_TOKEN"})
"""Variables of the client commands. They are not settings of a broker."""

_MIN_LENGTH_IN_LIST = 16
_NUMBER = re.compile(r"[+-]?\d+(?P<fraction>\.\d+)?")
_NUMBERS = Duration, Timeout, Size, LogSize, Count, Workers
# Kubernetes sets variables for each Service in every container. A Service `catbus` sets CATBUS_PORT and others.
_KUBERNETES_SERVICE = re.compile(r"CATBUS\w*_(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")


def variable_name(name: str) -> str:
    """Return the variable of a setting: `CATBUS_LIMITS_CONNECTIONS` for `limits.connections`."""
    return f"CATBUS_{name.upper().replace('.', '_')}"


def variables(names: Iterable[str]) -> dict[str, str]:
    """Map every variable to its setting, for the settings `names`. If two variables set one setting, the later wins."""
    return SHORT_VARIABLES | {variable_name(name): name for name in names}


def parse_variable(name: str, kind: Any, text: str) -> object:
    """Parse the `text` of a variable to the value that a file would have. `kind` is the type of the setting `name`."""
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
    """Return the directives of RUST_LOG that are log levels. Others are for other programs."""
    kept = []
    for directive in text.replace("::", ".").split(","):
        try:
            parse_levels(directive)
        except ValueError:
            continue
        kept.append(directive.strip())
    return ",".join(kept) or "catbus=info"


def find_unknown_variables(
    environ: Mapping[str, str], known: Iterable[str], renamed: Mapping[str, str]
) -> Iterator[str]:
    """Yield a sentence for each variable that begins with CATBUS_ and has no effect. Values are not shown.

    `renamed` maps earlier variables to the present ones.
    """
    valid = {*known, *CLIENT_VARIABLES}
    # The common prefix is removed, because it would make all names similar.
    endings = {name.removeprefix("CATBUS_"): name for name in sorted(valid)}
    for name in sorted(environ):
        if not name.upper().startswith("CATBUS_") or name in valid or _is_set_by_kubernetes(name, environ[name]):
            continue
        close = difflib.get_close_matches(name.upper().removeprefix("CATBUS_"), endings, n=1)
        likely = renamed.get(name) or (endings[close[0]] if close else None)
        guess = f" (did you mean {likely}?)" if likely else ""
        yield f"{name} is not a known variable and has no effect{guess}"


def _secrets(text: str) -> list[str]:
    # A secret in use may contain a comma. The text is a list only if every part is long enough for a secret, and then
    # the whole text still verifies tokens.
    parts = [part.strip() for part in text.split(",")]
    several = len(parts) > 1 and all(len(part) >= _MIN_LENGTH_IN_LIST for part in parts)
    return [*parts, text] if several else [text]


def _list(text: str) -> object:
    # "[]" is the only way to write an empty list, because an empty variable is not set. "[::1]:8080" is not TOML.
    if text.startswith("["):
        try:
            return tomllib.loads(f"list = {text}")["list"]
        except tomllib.TOMLDecodeError:
            pass
    return [part.strip() for part in text.split(",")]


def _is_set_by_kubernetes(name: str, value: str) -> bool:
    return _KUBERNETES_SERVICE.fullmatch(name) is not None or (name.endswith("_PORT") and "://" in value)
