"""The loader of a configuration. It checks each value at its source, so that an error can name the source."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError
from .environment_variables import find_unknown_variables, known_directives, parse_variable, variable_name, variables
from .network_addresses import redact_url
from .settings import RENAMED, Config, explain_unknown_key, sections, settings
from .value_types import convert_value, describe_mismatch, describe_type, format_value

VARIABLES = variables(settings())
"""Environment variables with their settings. If two variables set one setting, the later wins."""

_RENAMED_VARIABLES = {variable_name(old): variable_name(new) for old, new in RENAMED.items()}
_DEFAULT = "default"


class LoadedConfig(NamedTuple):
    """A configuration with the sources of its settings."""

    config: Config
    sources: Mapping[str, str]
    """By dotted name, the source of each setting without its default: a file, a variable or "command line"."""
    warnings: tuple[str, ...]
    """Sentences about environment variables that have no effect."""


def load(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
    defaults: Mapping[str, object] | None = None,
) -> Config:
    """Load a configuration, as `load_with_sources` does, and return it without the sources."""
    return load_with_sources(path, environ, overrides, defaults).config


def load_with_sources(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
    defaults: Mapping[str, object] | None = None,
) -> LoadedConfig:
    """Load a configuration from the file at `path`, then `environ`, then `overrides`. The later source wins.

    `overrides` maps dotted names such as `database.url` to values. None means that a value is not given, and so does an
    empty variable. `defaults` replace built-in defaults. Raises `ConfigError` with the source, the key, the expected
    value and the found value.
    """
    draft = _ConfigDraft()
    for name, value in (defaults or {}).items():
        draft.put(_DEFAULT, name, name, value)
    if path is not None:
        draft.read_file(path)
    draft.read_environment(environ or {})
    for name, value in (overrides or {}).items():
        if value is not None:
            draft.put("command line", name, name, value)
    sources = {name: place for name, place in draft.places.items() if place != _DEFAULT}
    return LoadedConfig(
        draft.config(),
        sources,
        (*draft.warnings, *find_unknown_variables(environ or {}, VARIABLES, _RENAMED_VARIABLES)),
    )


def show_setting(config: Config, name: str) -> str:
    """Format the value of a setting as TOML, without secrets. Return "none" if it has no value."""
    setting, value = settings()[name], _value(config, name)
    if value is None:
        return "none"
    if not setting.hidden:
        return format_value(value)
    return format_value(redact_url(value) if name.startswith("database.") else "***")


def changed_settings(one: Config, other: Config) -> list[str]:
    """Return the dotted names of the settings that differ between two configurations."""
    return [name for name in settings() if _value(one, name) != _value(other, name)]


def _value(config: Config, name: str) -> Any:
    section, _, _ = name.rpartition(".")
    return getattr(getattr(config, section) if section else config, settings()[name].field)


def setting_descriptions() -> dict[str, str]:
    """Return every setting by its dotted name, with a description of the expected value."""
    return {name: describe_type(setting.hint) for name, setting in settings().items()}


class _ConfigDraft:
    """The values read so far, each checked at its source, so that an error can name the source."""

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
            # Not only TOMLDecodeError: Python refuses to convert a number with too many digits.
            raise ConfigError(f"{place}: is not valid TOML: {error}") from None
        for key, value in document.items():
            if key in sections():
                self._read_section(place, key, value, path.parent)
            else:
                self.put(place, key, key, value, path.parent)

    def _read_section(self, place: str, section: str, table: object, base: Path) -> None:
        if not isinstance(table, dict):
            raise ConfigError(f"{place}: {section}: expected a table, [{section}], found {format_value(table)}")
        for key, value in table.items():
            self.put(place, f"[{section}] {key}", f"{section}.{key}", value, base)

    def read_environment(self, environ: Mapping[str, str]) -> None:
        taken: dict[str, tuple[str, str]] = {}
        for variable, name in VARIABLES.items():
            if text := environ.get(variable, "").strip():
                other, previous = taken.get(name, (variable, text))
                if previous != text and other != "RUST_LOG":
                    self.warnings.append(f"{other} has no effect, because {variable} sets {name}, too")
                taken[name] = variable, text
                text = known_directives(text) if variable == "RUST_LOG" else text
                self.put(variable, "", name, parse_variable(name, settings()[name].hint, text))

    def put(self, place: str, label: str, name: str, value: object, base: Path | None = None) -> None:
        """Set the value of the setting `name`. Paths in a file are relative to `base`, its directory."""
        where = f"{place}: {label}" if label else place
        setting = settings().get(name)
        if setting is None:
            raise ConfigError(f"{where}: {explain_unknown_key(name)}")
        try:
            self._values[name] = convert_value(setting.hint, value, base)
        except ValueError:
            raise ConfigError(f"{where}: {describe_mismatch(setting.hint, value, hidden=setting.hidden)}") from None
        self.places[name] = place

    def config(self) -> Config:
        parts: dict[str, dict[str, object]] = {"": {}, **{section: {} for section in sections()}}
        for name, value in self._values.items():
            parts[name.rpartition(".")[0]][settings()[name].field] = value
        made = {name: section(**parts[name]) for name, section in sections().items()}
        return Config(**made, **parts[""])  # type: ignore[arg-type]
