"""Reading a configuration: each value is checked where it comes from, so that an error can name the place."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from ..errors import ConfigError
from .addresses import split_address
from .levels import parse_levels
from .settings import Address, Config, DatabaseUrl, Duration, File, Levels, LogSize, PostgresUrl, Section, Size, Timeout

ENVIRONMENT = {
    "DATABASE_URL": "database.url",
    "CATBUS_LISTEN_URL": "database.listen_url",
    "CATBUS_SECRET": "auth.secret",
    "CATBUS_ADMIN_KEY": "auth.admin_key",
    "CATBUS_WS_BIND": "websocket.bind",
    "CATBUS_WS_TLS": "websocket.tls",
    "CATBUS_BIND": "webtransport.bind",
    "CATBUS_CERT": "webtransport.cert",
    "CATBUS_KEY": "webtransport.key",
    "RUST_LOG": "logging.levels",
    "CATBUS_LOG": "logging.levels",
    "CATBUS_STATE": "state",
}
"""Which setting a variable stands for. Of two for one setting, the later wins."""


def load(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
    defaults: Mapping[str, object] | None = None,
) -> Config:
    """Read a configuration: the file at `path`, then `environ`, then `overrides`; what comes later wins.

    `overrides` maps dotted names such as `database.url` to values; None stands for "not given", and so does an
    empty variable. `defaults` take the place of the built-in ones. Raises `ConfigError`, which says where, which key,
    what was expected and what was found.
    """
    draft = _Draft()
    for name, value in (defaults or {}).items():
        draft.put("default", name, name, value)
    if path is not None:
        draft.read_file(path)
    for variable, name in ENVIRONMENT.items():
        if text := (environ or {}).get(variable, "").strip():
            draft.put(variable, "", name, _from_environment(variable, text))
    for name, value in (overrides or {}).items():
        if value is not None:
            draft.put("command line", name, name, value)
    config = draft.config()
    _check_together(config)
    return config


def parse_duration(text: str) -> float:
    """Text like "30s", "5m", "1h" or "7d" as seconds; raises `ValueError`."""
    return _amount(text, _SECONDS)


def keys() -> dict[str, str]:
    """Every setting by its dotted name as a file has it, with what is expected of it."""
    return {name: _expected(hint) for name, (_, hint) in _SETTINGS.items()}


_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_BYTES = {"B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}
_BYTES |= {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}
_SHORTEST_OF_SEVERAL = 16


class _Draft:
    """Values as they come in, each checked where it comes from, so that an error can name its place."""

    def __init__(self) -> None:
        self._values: dict[str, object] = {}

    def read_file(self, path: Path) -> None:
        place = str(path)
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{place}: cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{place}: is not UTF-8 text") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{place}: is not valid TOML: {error}") from None
        for key, value in document.items():
            if key in _SECTIONS:
                self._read_section(place, key, value, path.parent)
            else:
                self.put(place, key, key, value, path.parent)

    def _read_section(self, place: str, section: str, table: object, base: Path) -> None:
        if not isinstance(table, dict):
            raise ConfigError(f"{place}: {section}: expected a table, [{section}], found {_found(table)}")
        for key, value in table.items():
            self.put(place, f"[{section}] {key}", f"{section}.{key}", value, base)

    def put(self, place: str, label: str, name: str, value: object, base: Path | None = None) -> None:
        """Take a value for the setting `name`. Paths in a file are relative to its directory, `base`."""
        where = f"{place}: {label}" if label else place
        if name not in _SETTINGS:
            raise ConfigError(f"{where}: unknown key{_known(name)}")
        hint = _SETTINGS[name][1]
        try:
            checked = _check(hint, value)
        except ValueError:
            found = _found_secret(value) if _is_hidden(name) else _found(value)
            raise ConfigError(f"{where}: expected {_expected(hint)}, found {found}") from None
        self._values[name] = _resolve(hint, checked, base)

    def config(self) -> Config:
        parts: dict[str, dict[str, object]] = {section: {} for section in _SECTIONS}
        top: dict[str, Any] = {}
        for name, value in self._values.items():
            section, _, _ = name.rpartition(".")
            (parts[section] if section else top)[_SETTINGS[name][0]] = value
        for section, values in parts.items():
            top[section] = _SECTIONS[section](**values)
        return Config(**top)


def _check_together(config: Config) -> None:
    database, transport, socket = config.database, config.webtransport, config.websocket
    if database.failover == "lossless" and database.synchronous_commit in ("off", "local"):
        raise ConfigError(
            'database.failover is "lossless", and with database.synchronous_commit = '
            f'"{database.synchronous_commit}" no commit waits for a standby'
        )
    if (transport.cert is None) != (transport.key is None):
        given, missing = ("cert", "key") if transport.cert else ("key", "cert")
        raise ConfigError(
            f"webtransport.{given} is set without webtransport.{missing}: set both (CATBUS_CERT and CATBUS_KEY)"
        )
    if socket.tls and transport.cert is None and not config.loopback:
        raise ConfigError(
            "websocket.tls is true, and there is no certificate: set webtransport.cert and webtransport.key "
            "(CATBUS_CERT and CATBUS_KEY), or leave TLS to a proxy"
        )
    if socket.silence <= socket.ping_interval:
        raise ConfigError(
            f"websocket.silence ({socket.silence:g} s) has to be longer than "
            f"websocket.ping_interval ({socket.ping_interval:g} s)"
        )


def _from_environment(variable: str, text: str) -> object:
    match variable:
        case "CATBUS_SECRET":
            # A comma may well stand in a secret that is in use. Only where every part would do as a secret are
            # they several, and then the whole still verifies.
            parts = [part.strip() for part in text.split(",")]
            several = len(parts) > 1 and all(len(part) >= _SHORTEST_OF_SEVERAL for part in parts)
            return [*parts, text] if several else [text]
        case "CATBUS_BIND" | "CATBUS_WS_BIND":
            return [part.strip() for part in text.split(",")]
        case "CATBUS_WS_TLS":
            return {"true": True, "false": False}.get(text.lower(), text)
        case "RUST_LOG":
            return _known_directives(text)
        case _:
            return text


def _known_directives(text: str) -> str:
    """What of a RUST_LOG means something here; the rest was written for another program and is no mistake."""
    kept = []
    for directive in text.replace("::", ".").split(","):
        try:
            parse_levels(directive)
        except ValueError:
            continue
        kept.append(directive.strip())
    return ",".join(kept) or "catbus=info"


def _check(hint: Any, value: object) -> object:
    """`value` as the setting wants it; raises `ValueError`."""
    kind = _kind(hint)
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list | tuple):
            raise ValueError
        return tuple(_check(item, each) for each in value)
    if isinstance(value, str):
        value = _read_text(kind, value)
    # msgspec's own error is a ValueError, but what it says is for programmers.
    return msgspec.convert(value, kind)


def _read_text(kind: Any, text: str) -> object:
    if kind in (Duration, Timeout):
        return _amount(text, _SECONDS)
    if kind in (Size, LogSize):
        return int(_amount(text, _BYTES))
    if kind == Levels:
        parse_levels(text)
    if kind == Address:
        try:
            split_address(text)
        except ConfigError:
            raise ValueError from None
    if kind == DatabaseUrl and text in ("embedded", "memory"):
        return text
    if kind in (DatabaseUrl, PostgresUrl) and not text.startswith(("postgres://", "postgresql://")):
        raise ValueError
    return text


def _amount(text: str, units: Mapping[str, float]) -> float:
    match = _AMOUNT.fullmatch(text)
    if match is None or match[2] not in units:
        raise ValueError
    return float(match[1]) * units[match[2]]


def _resolve(hint: Any, value: Any, base: Path | None) -> object:
    kind = _kind(hint)
    if base is None or value is None:
        return value
    if kind == File:
        return str(base / Path(value).expanduser())
    if get_origin(kind) is tuple and get_args(kind)[0] == File:
        return tuple(str(base / Path(each).expanduser()) for each in value)
    return value


def _kind(hint: Any) -> Any:
    """What a value is when there is one: `X` for `X | None`. A file has no way to write None."""
    rest = [each for each in get_args(hint) if each is not type(None)]
    return rest[0] if type(None) in get_args(hint) else hint


def _expected(hint: Any) -> str:
    kind = _kind(hint)
    if get_origin(kind) is tuple:
        return f"{_expected(get_args(kind)[0])}, or a list of such"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in get_args(kind))
    return next(meta.description for meta in get_args(kind) if isinstance(meta, Meta) and meta.description)


def _found(value: object) -> str:
    """A value for an error message, as TOML would write it and not too long."""
    match value:
        case float():
            return repr(value)
        case bool() | str() | int():
            text = json.dumps(value, ensure_ascii=True)
            return text if len(text) <= 60 else text[:57] + '..."'
        case list() | tuple():
            return "[" + ", ".join(map(_found, value[:4])) + (", ...]" if len(value) > 4 else "]")
        case dict():
            return "a table"
        case _:
            return f"a {type(value).__name__}"


def _found_secret(value: object) -> str:
    scheme, separator, _ = value.partition("://") if isinstance(value, str) else ("", "", "")
    return _found(f"{scheme}://...") if separator else "something else"


def _known(name: str) -> str:
    section, _, key = name.rpartition(".")
    prefix = f"{section}." if section else ""
    known = [other.removeprefix(prefix) for other in _SETTINGS if other.rpartition(".")[0] == section]
    if not section:
        known += [f"[{each}]" for each in _SECTIONS]
    close = difflib.get_close_matches(key, known, n=1)
    guess = f' (did you mean "{close[0]}"?)' if close else ""
    return f"{guess}; known are {', '.join(sorted(known))}"


def _is_hidden(name: str) -> bool:
    section, _, _ = name.rpartition(".")
    return bool(section) and _SETTINGS[name][0] in _SECTIONS[section].hidden


_SECTIONS: dict[str, type[Section]] = {
    name: hint for name, hint in get_type_hints(Config).items() if isinstance(hint, type) and issubclass(hint, Section)
}


def _settings() -> dict[str, tuple[str, Any]]:
    found: dict[str, tuple[str, Any]] = {}
    owners: list[tuple[str, type[Section]]] = [("", Config)]
    owners += [(f"{name}.", section) for name, section in _SECTIONS.items()]
    for prefix, owner in owners:
        hints = get_type_hints(owner, include_extras=True)
        for field in msgspec.structs.fields(owner):
            if prefix or field.name not in _SECTIONS:
                found[prefix + field.encode_name] = (field.name, hints[field.name])
    return found


_SETTINGS = _settings()
"""By dotted name as a file has it: the field's own name, and its type."""
