"""Reading a configuration: each value is checked where it comes from, so that an error can name the place."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError
from .environment_variables import find_misspelt, known_directives, parse_variable, variables
from .network_addresses import redact
from .settings import Config, sections, settings, unknown
from .value_types import convert, expected, found, mistake

ENVIRONMENT = variables(settings())
"""Which setting a variable stands for. Of two for one setting, the later wins."""

_DEFAULT = "default"


class Reading(NamedTuple):
    """A configuration, and where it comes from."""

    config: Config
    sources: Mapping[str, str]
    """By dotted name, what set a setting: a file, a variable, or "command line". The others have their defaults."""
    warnings: tuple[str, ...]
    """Sentences about variables that have no effect."""


def load(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
    defaults: Mapping[str, object] | None = None,
) -> Config:
    """The configuration that `read` reads."""
    return read(path, environ, overrides, defaults).config


def read(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
    defaults: Mapping[str, object] | None = None,
) -> Reading:
    """Read a configuration: the file at `path`, then `environ`, then `overrides`; what comes later wins.

    `overrides` maps dotted names such as `database.url` to values; None stands for "not given", and so does an
    empty variable. `defaults` take the place of the built-in ones. Raises `ConfigError`, which says where, which key,
    what was expected and what was found.
    """
    draft = _Draft()
    for name, value in (defaults or {}).items():
        draft.put(_DEFAULT, name, name, value)
    if path is not None:
        draft.read_file(path)
    draft.read_environment(environ or {})
    for name, value in (overrides or {}).items():
        if value is not None:
            draft.put("command line", name, name, value)
    sources = {name: place for name, place in draft.places.items() if place != _DEFAULT}
    return Reading(draft.config(), sources, (*draft.warnings, *find_misspelt(environ or {}, ENVIRONMENT)))


def show(config: Config, name: str) -> str:
    """The value of a setting as TOML has it, without what is secret; "none" where it has no value."""
    setting, value = settings()[name], _value(config, name)
    if value is None:
        return "none"
    if not setting.hidden:
        return found(value)
    return found(redact(value) if name.startswith("database.") else "***")


def differences(one: Config, other: Config) -> list[str]:
    """The dotted names of the settings that differ."""
    return [name for name in settings() if _value(one, name) != _value(other, name)]


def _value(config: Config, name: str) -> Any:
    section, _, _ = name.rpartition(".")
    return getattr(getattr(config, section) if section else config, settings()[name].field)


def keys() -> dict[str, str]:
    """Every setting by its dotted name as a file has it, with what is expected of it."""
    return {name: expected(setting.hint) for name, setting in settings().items()}


class _Draft:
    """Values as they come in, each checked where it comes from, so that an error can name its place."""

    def __init__(self) -> None:
        self.places: dict[str, str] = {}
        self.warnings: list[str] = []
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

    def read_environment(self, environ: Mapping[str, str]) -> None:
        taken: dict[str, tuple[str, str]] = {}
        for variable, name in ENVIRONMENT.items():
            if text := environ.get(variable, "").strip():
                other, said = taken.get(name, (variable, text))
                if said != text and other != "RUST_LOG":
                    self.warnings.append(f"{other} has no effect, as {variable} sets {name}, too")
                taken[name] = variable, text
                text = known_directives(text) if variable == "RUST_LOG" else text
                self.put(variable, "", name, parse_variable(name, settings()[name].hint, text))

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
        self.places[name] = place

    def config(self) -> Config:
        parts: dict[str, dict[str, object]] = {"": {}, **{section: {} for section in sections()}}
        for name, value in self._values.items():
            parts[name.rpartition(".")[0]][settings()[name].field] = value
        made = {name: section(**parts[name]) for name, section in sections().items()}
        return Config(**made, **parts[""])  # type: ignore[arg-type]
