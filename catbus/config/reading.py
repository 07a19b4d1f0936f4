"""Reading a configuration: each value is checked where it comes from, so that an error can name the place."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

from ..errors import ConfigError
from .levels import parse_levels
from .settings import Config, sections, settings, unknown
from .values import convert, expected, found, mistake

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
    return draft.config()


def keys() -> dict[str, str]:
    """Every setting by its dotted name as a file has it, with what is expected of it."""
    return {name: expected(setting.hint) for name, setting in settings().items()}


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
        except (ValueError, RecursionError) as error:
            # Not only TOMLDecodeError: a number may have more digits than Python reads.
            raise ConfigError(f"{place}: is not valid TOML: {error}") from None
        for key, value in document.items():
            if key in sections():
                self._read_section(place, key, value, path.parent)
            else:
                self.put(place, key, key, value, path.parent)

    def _read_section(self, place: str, section: str, table: object, base: Path) -> None:
        if not isinstance(table, dict):
            raise ConfigError(f"{place}: {section}: expected a table, [{section}], found {found(table)}")
        for key, value in table.items():
            self.put(place, f"[{section}] {key}", f"{section}.{key}", value, base)

    def put(self, place: str, label: str, name: str, value: object, base: Path | None = None) -> None:
        """Take a value for the setting `name`. Paths in a file are relative to its directory, `base`."""
        where = f"{place}: {label}" if label else place
        setting = settings().get(name)
        if setting is None:
            raise ConfigError(f"{where}: {unknown(name)}")
        try:
            self._values[name] = convert(setting.hint, value, base)
        except ValueError:
            raise ConfigError(f"{where}: {mistake(setting.hint, value, hidden=setting.hidden)}") from None

    def config(self) -> Config:
        parts: dict[str, dict[str, object]] = {"": {}, **{section: {} for section in sections()}}
        for name, value in self._values.items():
            parts[name.rpartition(".")[0]][settings()[name].field] = value
        made = {name: section(**parts[name]) for name, section in sections().items()}
        return Config(**made, **parts[""])  # type: ignore[arg-type]


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
