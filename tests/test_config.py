"""The sources, types and errors of settings."""

from __future__ import annotations

import base64
import json
import random
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import msgspec
import pytest

import catbus.cli
from catbus.config import (
    VARIABLES,
    AuthSettings,
    Config,
    DatabaseSettings,
    DrainSettings,
    LimitSettings,
    RetentionSettings,
    WebSocketSettings,
    changed_settings,
    default_state_directory,
    find_weak_secrets,
    find_weakness,
    is_loopback,
    load,
    load_with_sources,
    parse_levels,
    redact_url,
    setting_descriptions,
    show_setting,
    split_address,
    variable_name,
)
from catbus.errors import ConfigError


def write(directory: Path, text: str) -> Path:
    path = directory / "catbus.toml"
    path.write_text(text)
    return path


def complaint(path: Path | None = None, environ: Mapping[str, str] | None = None, **overrides: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, environ, {name.replace("__", "."): value for name, value in overrides.items()})
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_default_configuration_suits_embedding() -> None:
    assert load() == Config()
    assert Config().database.url == "memory"
    assert Config().websocket.bind == ("0.0.0.0:8080",)
    assert Config().webtransport.bind == ("0.0.0.0:4433",)


def test_file_is_loaded(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        state = "here"
        [database]
        url = "embedded"
        publish_timeout = 7
        [auth]
        secret = ["new", "old"]
        [websocket]
        bind = "127.0.0.1:9000"
        silence = "5m"
        [webtransport]
        cert = "tls/cert.pem"
        key = "/etc/key.pem"
        [limits]
        message_size = "128KiB"
        send_queue = 1000
        [retention]
        age = "7d"
        size = "1.5TiB"
        [drain]
        delay = 0
        """,
    )
    config = load(path)
    assert config.state == str(tmp_path / "here")
    assert config.state_directory == tmp_path / "here"
    assert config.database == DatabaseSettings(url="embedded", publish_timeout=7.0)
    assert config.auth.secrets == ("new", "old")
    assert config.websocket == WebSocketSettings(bind=("127.0.0.1:9000",), silence=300.0)
    assert config.webtransport.cert == str(tmp_path / "tls/cert.pem")
    assert config.webtransport.key == "/etc/key.pem"
    assert config.limits.message_size == 131_072
    assert config.limits.send_queue == 1000
    assert config.retention == RetentionSettings(age=604_800.0, size=3 << 39)
    assert config.drain.delay == 0
    assert type(config.database.publish_timeout) is float


def test_environment_overrides_the_file_and_options_override_both(tmp_path: Path) -> None:
    path = write(tmp_path, '[database]\nurl = "memory"\n[websocket]\nbind = "127.0.0.1:1"\n')
    environ = {"DATABASE_URL": "postgres://db/one", "CATBUS_WS_BIND": "127.0.0.1:2, [::1]:2"}
    config = load(path, environ, {"websocket.bind": ["127.0.0.1:3"], "database.url": None})
    assert config.database.url == "postgres://db/one"
    assert config.websocket.bind == ("127.0.0.1:3",)
    assert load(path, environ).websocket.bind == ("127.0.0.1:2", "[::1]:2")


def test_defaults_of_the_caller_apply_without_other_sources(tmp_path: Path) -> None:
    path = tmp_path / "catbus.toml"
    path.write_text('[database]\nurl = "memory"\n')
    defaults = {"database.url": "embedded"}
    assert load(None, {}, {"database.url": None}, defaults).database.url == "embedded"
    assert load(path, {}, None, defaults).database.url == "memory"
    assert load(None, {"DATABASE_URL": "memory"}, None, defaults).database.url == "memory"
    assert load(None, {}, {"database.url": "memory"}, defaults).database.url == "memory"


def test_every_short_variable_sets_its_setting() -> None:
    config = load(
        environ={
            "DATABASE_URL": "postgresql://db/catbus",
            "CATBUS_LISTEN_URL": "postgres://direct/catbus",
            "CATBUS_SECRET": "hush\n",
            "CATBUS_ADMIN_KEY": "root",
            "CATBUS_CERT": "/tls/tls.crt",
            "CATBUS_KEY": "/tls/tls.key",
            "CATBUS_BIND": "[::]:4433",
            "CATBUS_WS_BIND": "0.0.0.0:80",
            "CATBUS_LOG": "catbus=debug,aioquic=warning",
            "CATBUS_STATE": "/state",
            "CATBUS_TRUSTED_PROXIES": "10.0.0.0/8, fd00::/8",
        }
    )
    assert config.database == DatabaseSettings(url="postgresql://db/catbus", listen_url="postgres://direct/catbus")
    assert config.auth == AuthSettings(secrets=("hush",), admin_key="root")
    assert (config.webtransport.cert, config.webtransport.key) == ("/tls/tls.crt", "/tls/tls.key")
    assert (config.webtransport.bind, config.websocket.bind) == (("[::]:4433",), ("0.0.0.0:80",))
    assert config.logging.levels == "catbus=debug,aioquic=warning"
    assert config.state_directory == Path("/state")
    assert config.websocket.trusted_proxies == ("10.0.0.0/8", "fd00::/8")


def test_empty_variable_is_not_set(tmp_path: Path) -> None:
    path = write(tmp_path, '[auth]\nsecret = "from the file"\n')
    assert load(path, {"CATBUS_SECRET": " ", "DATABASE_URL": ""}).auth.secrets == ("from the file",)


def test_variable_can_have_several_secrets() -> None:
    new, old = "n" * 16, "o" * 20
    assert load(environ={"CATBUS_SECRET": f"{new}, {old}"}).auth.secrets == (new, old, f"{new}, {old}")


def test_secret_with_a_comma_is_not_split() -> None:
    assert load(environ={"CATBUS_SECRET": "k,8fj3kd93kf93jf93kd"}).auth.secrets == ("k,8fj3kd93kf93jf93kd",)


def test_rust_log_may_have_directives_of_other_programs() -> None:
    guide = {"RUST_LOG": "catbus=info,tower_http=debug"}
    assert load(environ=guide).logging.levels == "catbus=info,tower_http=debug"
    assert load(environ={**guide, "CATBUS_LOG": "warning"}).logging.levels == "warning"
    assert load(environ={"RUST_LOG": "catbus::session=trace,[span{x=1}]=info"}).logging.levels == "catbus.session=trace"
    assert load(environ={"RUST_LOG": "[span]=info"}).logging.levels == "catbus=info"


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("info", {"": 20}),
        ("catbus=DEBUG, aioquic=warn", {"catbus": 10, "aioquic": 30}),
        ("warning,catbus.log=trace,trio=off", {"": 30, "catbus.log": 10, "trio": 60}),
        ("", {}),
    ],
)
def test_log_levels_are_parsed(text: str, levels: dict[str, int]) -> None:
    assert parse_levels(text) == levels


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[database]\nurll = 1", ['[database] urll: unknown key (did you mean "url"?)', "known are connect_timeout, "]),
        ("[limits]\nmailbox = 1", ["[limits] mailbox: unknown key; its name is limits.send_queue now"]),
        ("databse = 1", ['databse: unknown key (did you mean "[database]"?)', "state"]),
        ("[nonsense]\nx = 1", ["nonsense: unknown key", "[limits]"]),
        ("database = 3", ["database: expected a table, [database], found 3"]),
        ("[database]\nurl = 5", ["[database] url: expected ", "postgres://", "found something else"]),
        ('[database]\nurl = "mysql://me:hunter2@db"', ["[database] url: expected", 'found "mysql://..."']),
        ("[auth]\nsecret = [1]", ["[auth] secret: expected a secret", "found something else"]),
        ('[auth]\nadmin_key = ""', ["[auth] admin_key: expected a secret"]),
        ("[websocket]\nbind = [8080]", ["[websocket] bind: expected an address with a port", "found [8080]"]),
        ('[websocket]\nbind = "localhost"', ['found "localhost"']),
        ('[websocket]\nbind = "localhost:65536"', ['found "localhost:65536"']),
        ('[websocket]\nbind = "::1:80"', ['found "::1:80"']),
        ('[websocket]\nping_interval = "soon"', ["[websocket] ping_interval: expected a duration", 'found "soon"']),
        ("[websocket]\nping_interval = 0", ["above 0", "found 0"]),
        ("[drain]\ndelay = inf", ["[drain] delay: expected a duration", "found inf"]),
        ("[drain]\ndelay = nan", ["found nan"]),
        ("[drain]\ndelay = -1", ["found -1"]),
        ("[limits]\nmessage_size = true", ["[limits] message_size: expected a size above 0", "found true"]),
        ('[limits]\nmessage_size = "64 sheep"', ['found "64 sheep"']),
        ('[limits]\nconnections = "64KiB"', ["expected a whole number above 0", 'found "64KiB"']),
        ('[retention]\nage = "a day"', ["[retention] age: expected a duration", "above 0", 'found "a day"']),
        ('[retention]\nsize = "1MiB"', ["[retention] size: expected a size of at least 64 MiB", 'found "1MiB"']),
        ("[limits]\nconnections = 1.5", ["found 1.5"]),
        ("[limits]\nconnections = 1979-05-27", ["found a date"]),
        ('[logging]\nlevels = "catbus=loud"', ["[logging] levels: expected log levels", 'found "catbus=loud"']),
        ('[logging]\nformat = "xml"', ['expected one of "auto", "json", "text", found "xml"']),
        ("[logging]\nformat = {}", ["found a table"]),
        ('[database]\nsynchronous_commit = "maybe"', ['"remote_apply"', 'found "maybe"']),
        ("state = []", ["state: expected a path, found []"]),
        ("[limits", ["is not valid TOML: Expected"]),
        ("[websocket]\nping_interval = 70", ["silence", "longer than", "70 s"]),
        ('[webtransport]\ncert = "c.pem"', ["webtransport.cert is set without webtransport.key"]),
    ],
)
def test_error_in_a_file_names_the_file_the_key_and_the_expected_value(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    said = complaint(path := write(tmp_path, text))
    for part in parts:
        assert part in said
    if "webtransport" not in text and "70" not in text:
        assert said.startswith(str(path))
    assert "hunter2" not in said


# Configurations in Python

TABLES: dict[str, dict[str, object]] = {
    "database": {"url": "postgres://db/catbus", "publish_timeout": "7s", "connect_timeout": 3},
    "retention": {"age": "7d", "size": "1.5TiB"},
    "auth": {"secret": ["new", "old"], "jwt": "/keys/public.pem"},
    "websocket": {"bind": ["127.0.0.1:9000", "[::1]:9000"], "silence": "5m", "allowed_origins": "https://a.example"},
    "webtransport": {"bind": [], "cert": "/tls/cert.pem", "key": "/tls/key.pem"},
    "limits": {"message_size": "128KiB", "send_queue": 1000},
    "drain": {"delay": 0},
    "logging": {"levels": "catbus=debug", "format": "json"},
}


def test_configuration_in_python_equals_the_same_file(tmp_path: Path) -> None:
    document = [f"state = {json.dumps(str(tmp_path))}"]
    for name, table in TABLES.items():
        document += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    loaded = load(write(tmp_path, "\n".join(document)))
    assert Config(state=tmp_path, **TABLES) == loaded  # type: ignore[arg-type]
    sections = {
        "state": str(tmp_path),
        "database": DatabaseSettings(url="postgres://db/catbus", publish_timeout="7s", connect_timeout=3),  # type: ignore[arg-type]
        "auth": AuthSettings(secrets=["new", "old"], jwt=Path("/keys/public.pem")),  # type: ignore[arg-type]
    }
    assert Config(**{**TABLES, **sections}) == loaded  # type: ignore[arg-type]
    made = msgspec.structs.replace(loaded.websocket, bind="127.0.0.1:1")
    assert made.bind == ("127.0.0.1:1",)
    assert Config(state=None, auth={"admin_key": None}) == Config()  # type: ignore[arg-type]
    assert Config(state="~/here").state == str(Path("~/here").expanduser())


@pytest.mark.parametrize(
    ("make", "given", "said"),
    [
        (Config, {"websocket": {"bind": [8080]}}, "websocket.bind: expected an address with a port"),
        (Config, {"websocket": {"bind": "here"}}, 'or a list of them, found "here"'),
        (Config, {"websocket": {"bnd": "127.0.0.1:1"}}, 'websocket.bnd: unknown key (did you mean "bind"?)'),
        (Config, {"websocket": {7: 1}}, "websocket.7: unknown key; known are"),
        (Config, {"websocket": DrainSettings()}, "expected a table, or a WebSocketSettings; found a DrainSettings"),
        (Config, {"websocket": None}, "websocket: expected a table, or a WebSocketSettings; found a NoneType"),
        (Config, {"state": 7}, "state: expected a path, found 7"),
        (Config, {"state": "~nobody-has-this-name/x"}, "state: expected a path, found"),
        (
            WebSocketSettings,
            {"bind": ("127.0.0.1",)},
            'websocket.bind: expected an address with a port, like "127.0.0.1:',
        ),
        (WebSocketSettings, {"ping_interval": "soon"}, 'websocket.ping_interval: expected a duration: .* found "soon"'),
        (
            WebSocketSettings,
            {"ping_interval": None},
            "websocket.ping_interval: expected a duration: .* found a NoneType",
        ),
        (WebSocketSettings, {"tls": "yes"}, 'websocket.tls: expected true or false, found "yes"'),
        (
            WebSocketSettings,
            {"trusted_proxies": "10.0.0.1/8"},
            "websocket.trusted_proxies: expected an address or a network",
        ),
        (WebSocketSettings, {"trusted_proxies": ("proxy",)}, 'or a list of them, found ["proxy"]'),
        (LimitSettings, {"message_size": 10**5000}, "limits.message_size: .* found a number that is too large"),
        (LimitSettings, {"message_size": "9" * 400 + "B"}, "limits.message_size: expected a size above 0"),
        (DatabaseSettings, {"url": "mysql://me:hunter2@db"}, 'database.url: expected .* found "mysql://..."'),
        (AuthSettings, {"secrets": ("hunter2", "")}, "auth.secret: expected a secret: .* found something else"),
        (Config, {"auth": {"secret": b"hunter2"}}, "auth.secret: expected a secret: .* found something else"),
        (Config, {"webtransport": {"cert": "c.pem"}}, "webtransport.cert is set without webtransport.key"),
        (Config, {"websocket": {"silence": 1}}, "websocket.silence (1 s) must be longer than"),
        (partial(msgspec.structs.replace, Config()), {"drain": {"delay": -1}}, "drain.delay: expected a duration"),
    ],
)  # fmt: skip
def test_wrong_value_in_python_names_its_setting(
    make: Callable[..., object], given: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**given)
    # Only `.*` is a wildcard.
    assert re.search(re.escape(said).replace(r"\.\*", ".*"), str(caught.value))
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[limits]\nmessage_size = " + "9" * 5000, "state = " + "[" * 5000])
def test_file_beyond_the_limits_of_python_is_an_error(tmp_path: Path, text: str) -> None:
    assert "catbus.toml: is not valid TOML: " in complaint(write(tmp_path, text))


def test_wrong_variable_is_named() -> None:
    assert complaint(environ={"CATBUS_WS_BIND": "here"}).startswith("CATBUS_WS_BIND: expected an address")
    assert "CATBUS_LOG: expected log levels" in complaint(environ={"CATBUS_LOG": "inof"})
    said = complaint(environ={"DATABASE_URL": "hunter2"})
    assert "DATABASE_URL" in said
    assert "hunter2" not in said


def test_wrong_option_is_named() -> None:
    assert complaint(websocket__bind="x").startswith("command line: websocket.bind: expected an address")


def test_unreadable_file_is_an_error(tmp_path: Path) -> None:
    assert "absent.toml: cannot be read: No such file" in complaint(tmp_path / "absent.toml")
    (tmp_path / "bytes.toml").write_bytes(b'state = "\xff"')
    assert complaint(tmp_path / "bytes.toml").endswith("is not UTF-8 text")


def test_secrets_are_not_shown() -> None:
    config = Config(
        auth=AuthSettings(secrets=("hunter2", "hunter2-old"), admin_key="hunter2-admin"),
        database=DatabaseSettings(
            url="postgres://me:hunter2@db/catbus?password=hunter2", listen_url="postgres://x:hunter2@y"
        ),
    )
    shown = f"{config} {config!r} {config.auth!r} {config.database}"
    assert "hunter2" not in shown
    assert "postgres://me:***@db/catbus?***" in shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memory", "memory"),
        ("postgres://db/x", "postgres://db/x"),
        ("postgres://me@db/x", "postgres://me@db/x"),
        ("postgres://me:p@ss:w@db/x", "postgres://me:***@db/x"),
        ("postgres://db/x?sslmode=require&password=p", "postgres://db/x?***"),
        ("postgres://me:hunter?2=@db/x", "postgres://***"),
        ("postgres://me:hunter/2@db/x", "postgres://me:***@db/x"),
    ],
)
def test_urls_are_redacted(url: str, shown: str) -> None:
    assert redact_url(url) == shown


def test_addresses_are_split() -> None:
    assert split_address("127.0.0.1:80") == ("127.0.0.1", 80)
    assert split_address("[::1]:0") == ("::1", 0)
    assert split_address("bus.example.com:65535") == ("bus.example.com", 65535)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("a.localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.com", False),
    ],
)
def test_loopback_addresses_are_recognised(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_configuration_knows_if_all_addresses_are_loopback() -> None:
    assert Config(websocket=WebSocketSettings(bind=("127.0.0.1:1", "[::1]:1"))).loopback
    assert not Config(websocket=WebSocketSettings(bind=("127.0.0.1:1", "0.0.0.0:1"))).loopback
    assert Config(websocket=WebSocketSettings(bind=())).loopback


def test_state_directory_has_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/cat")
    assert default_state_directory({"CATBUS_STATE": "/there"}) == Path("/there")
    assert default_state_directory({"XDG_STATE_HOME": "/xdg"}) == Path("/xdg/catbus")
    assert default_state_directory({}) == Path("/home/cat/.local/state/catbus")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_state_directory({"XDG_STATE_HOME": "/xdg"}) == Path("/var/lib/catbus")


def test_every_setting_describes_the_expected_value() -> None:
    assert all(setting_descriptions().values())
    assert {"auth.secret", "state", "limits.message_size"} <= set(setting_descriptions())


# Environment variables

EXAMPLES = {
    "a duration": ("1m", 60.0),
    "a size of": ("1GiB", 1 << 30),
    "a size above": ("64KiB", 65_536),
    "a whole number": ("12", 12),
    "a number of processes": ("12", 12),
    "true or false": ("true", True),
    "a path, or a URL": ("a.json, https://a.example/b?c=d", ("a.json", "https://a.example/b?c=d")),
    "a path": ("a/path", "a/path"),
    "a secret: text that is not empty, or": ("one", ("one",)),
    "a secret": ("one", "one"),
    "text, or a list": ('["a", "b"]', ("a", "b")),
    "an address or a network": ("10.0.0.0/8, ::1", ("10.0.0.0/8", "::1")),
    "an address": ("[::1]:1, 127.0.0.1:1", ("[::1]:1", "127.0.0.1:1")),
    '"embedded"': ("embedded", "embedded"),
    "a URL": ("postgres://db/x", "postgres://db/x"),
    "log levels": ("warning", "warning"),
    'one of "on"': ("off", "off"),
    'one of "lossy"': ("lossless", "lossless"),
    'one of "auto"': ("json", "json"),
}
"""By the beginning of a setting's description: a value in the environment, and the parsed value."""


@pytest.mark.parametrize("name", setting_descriptions())
def test_every_setting_has_a_variable(name: str) -> None:
    text, value = next(found for begins, found in EXAMPLES.items() if setting_descriptions()[name].startswith(begins))
    together = {"CATBUS_WEBTRANSPORT_CERT": "c", "CATBUS_WEBTRANSPORT_KEY": "k", "CATBUS_WEBSOCKET_SILENCE": "70s"}
    reading = load_with_sources(environ={**together, variable_name(name): text})
    section, _, key = name.rpartition(".")
    found = getattr(reading.config, section) if section else reading.config
    assert getattr(found, {"secret": "secrets"}.get(key, key)) == value
    assert reading.sources[name] == variable_name(name)
    assert not reading.warnings


def test_variables_accept_the_same_values_as_a_file() -> None:
    environ = {
        "CATBUS_DRAIN_DELAY": "2.5",
        "CATBUS_LIMITS_SEND_QUEUE": "1000",
        "CATBUS_WEBTRANSPORT_BIND": "[]",
        "CATBUS_WEBSOCKET_BIND": '["[::1]:1"]',
        "CATBUS_WEBSOCKET_TLS": "False",
    }
    config = load(environ=environ)
    assert (config.drain.delay, config.limits.send_queue) == (2.5, 1000)
    assert (config.webtransport.bind, config.websocket.bind) == ((), ("[::1]:1",))
    assert config.websocket.tls is False


@pytest.mark.parametrize(
    "url",
    [
        "http://issuer.example/keys",
        "http://10.0.0.1/keys",
        "ftp://localhost/keys",
        "https:///keys",
        "https://issuer.example:port/keys",
        "https://issuer.example:70000/keys",
        "https://me@issuer.example/keys",
        "https://me:hidden@issuer.example/keys",
        "https://issuer.example/keys#x",
        "https://issuer.example/ keys?hidden",
        "https://issuer.example/keys\r\nHost: x",
    ],
)
def test_key_sets_come_by_https_or_from_this_machine(url: str) -> None:
    with pytest.raises(ConfigError, match=r"auth.jwt: expected a path, or a URL that begins with https://") as caught:
        AuthSettings(jwt=("keys.json", url))
    assert "hidden" not in str(caught.value)
    for allowed in ("https://issuer.example/keys", "http://localhost:8000/keys", "http://[::1]/keys"):
        assert AuthSettings(jwt=allowed).jwt == (allowed,)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["-1", "1e9", "12 sheep", "nan", "0x10", "1_0"])
def test_wrong_amount_in_a_variable_is_an_error(text: str) -> None:
    said = complaint(environ={"CATBUS_LIMITS_CONNECTIONS": text})
    assert said.startswith("CATBUS_LIMITS_CONNECTIONS: expected a whole number above 0, found ")


def test_every_variable_sets_one_setting() -> None:
    assert len({variable_name(name) for name in setting_descriptions()}) == len(setting_descriptions())
    assert set(VARIABLES.values()) == set(setting_descriptions())


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("CATBUS_SECERT", "CATBUS_SECRET"),
        ("CATBUS_SECRETS", "CATBUS_SECRET"),
        ("catbus_secret", "CATBUS_SECRET"),
        ("CATBUS_LIMIT_CONNECTIONS", "CATBUS_LIMITS_CONNECTIONS"),
        ("CATBUS_TOKE", "CATBUS_TOKEN"),
        ("CATBUS_DATABASE", "DATABASE_URL"),
        ("CATBUS_LIMITS_MAILBOX", "CATBUS_LIMITS_SEND_QUEUE"),
        ("CATBUS_PORT", ""),
        ("CATBUS_XYZZY", ""),
    ],
)
def test_unknown_variable_is_reported_with_a_suggestion(name: str, guess: str) -> None:
    [warning] = load_with_sources(environ={name: "hunter2"}).warnings
    assert warning.startswith(f"{name} is not a known variable")
    assert warning.endswith(f"(did you mean {guess}?)" if guess else "has no effect")
    assert "hunter2" not in warning


@pytest.mark.parametrize(
    "name", ["CATBUS_WS_SERVICE_HOST", "CATBUS_SERVICE_PORT_WEBSOCKET", "CATBUS_PORT", "CATBUS_WT_PORT_4433_UDP_ADDR"]
)
def test_variables_of_kubernetes_are_not_reported(name: str) -> None:
    assert load_with_sources(environ={name: "tcp://10.0.0.1:8080", "PATH": "x", "RUST_LOG": "x=info"}).warnings == ()


def test_variables_of_the_client_commands_are_not_reported() -> None:
    sources = "".join(path.read_text() for path in Path(catbus.cli.__file__).parent.glob("*.py"))
    names = set(re.findall(r'envvar="(\w+)"', sources))
    assert names
    assert load_with_sources(environ=dict.fromkeys(names, "x")).warnings == ()


def test_overridden_variable_is_reported() -> None:
    reading = load_with_sources(environ={"CATBUS_WS_BIND": "127.0.0.1:1", "CATBUS_WEBSOCKET_BIND": "127.0.0.1:2"})
    assert reading.config.websocket.bind == ("127.0.0.1:2",)
    assert reading.warnings == ("CATBUS_WS_BIND has no effect, because CATBUS_WEBSOCKET_BIND sets websocket.bind, too",)
    assert not load_with_sources(environ={"RUST_LOG": "info", "CATBUS_LOG": "debug"}).warnings


def test_each_value_has_its_source(tmp_path: Path) -> None:
    path = write(tmp_path, '[limits]\nconnections = 1\nrecent = 1\nsend_queue = 1\n[auth]\nsecret = "hunter2"\n')
    environ = {"CATBUS_LIMITS_RECENT": "2", "CATBUS_LIMITS_SEND_QUEUE": "2"}
    reading = load_with_sources(
        path, environ, {"limits.send_queue": 3}, {"database.url": "embedded", "limits.recent": 9}
    )
    assert reading.sources == {
        "limits.connections": str(path),
        "limits.recent": "CATBUS_LIMITS_RECENT",
        "limits.send_queue": "command line",
        "auth.secret": str(path),
    }
    assert (reading.config.limits.recent, reading.config.limits.send_queue) == (2, 3)
    assert show_setting(reading.config, "limits.send_queue") == "3"
    assert show_setting(reading.config, "state") == "none"
    assert "hunter2" not in show_setting(reading.config, "auth.secret")
    assert show_setting(load(environ={"DATABASE_URL": "postgres://me:hunter2@db/x"}), "database.url") == (
        '"postgres://me:***@db/x"'
    )


def test_changed_settings_are_named() -> None:
    one, other = load(), load(environ={"CATBUS_STATE": "x", "CATBUS_DRAIN_DELAY": "1", "CATBUS_SECRET": "y"})
    assert changed_settings(one, other) == ["state", "auth.secret", "drain.delay"]
    assert changed_settings(one, load()) == []


def documented() -> str:
    """Read the table of docs/configuration.md."""
    rows = []
    for name, expected in setting_descriptions().items():
        names = [each for each, setting in VARIABLES.items() if setting == name]
        rows.append(f"| `{name}` | {', '.join(f'`{each}`' for each in names)} | {expected} |")
    return "\n".join(rows)


def test_documentation_has_every_setting_with_its_variables() -> None:
    text = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert f"|---|---|---|\n{documented()}\n\n" in text


# Secrets


@pytest.mark.parametrize(
    ("secret", "why"),
    [
        ("abc", "has fewer than 32 bytes"),
        ("q7Lw2pT5rYb8nHd1mKc4sJf6g0aEuXz", "has fewer than 32 bytes"),
        ("é" * 15, "has fewer than 32 bytes"),
        ("x" * 64, "repeats the same characters"),
        ("0123456789abcdef" * 4, "repeats the same characters"),
        ("q7Lw2pT5rYb8nHd1" * 3, "repeats the same characters"),
        ("abcdefghijklmnopqrstuvwxyz0123456789", "is a sequence of the alphabet"),
        ("your-super-secret-jwt-signing-key-change-me", "consists of placeholder words"),
        ("CHANGE_ME_to_a_long_random_string_please", "consists of placeholder words"),
        ("development-secret-of-docker-compose", "is published in the documentation"),
        ("development-secret-of-the-dev-overlay", "is published in the documentation"),
        ("an example secret, not for use", "is published in the documentation"),
        ("your-secure-signing-secret", "is published in the documentation"),
    ],
)
def test_weak_secret_is_recognised(secret: str, why: str) -> None:
    assert str(find_weakness(secret)).startswith(why)


@pytest.mark.parametrize("seed", range(300))
def test_random_secret_has_no_weakness(seed: int) -> None:
    data = random.Random(seed).randbytes(32)
    for secret in (data.hex(), data[:16].hex(), base64.b64encode(data).decode(), base64.b64encode(data[:24]).decode()):
        assert find_weakness(secret) is None, secret


def test_every_secret_is_checked_and_none_is_shown() -> None:
    good = "q7Lw2pT5rYb8nHd1mKc4sJf6g0aEuXzV"
    config = Config(auth=AuthSettings(secrets=(good, "hunter2"), admin_key="hunter2-admin"))
    assert find_weak_secrets(config) == [
        "secret 2 has fewer than 32 bytes", "the admin key has fewer than 32 bytes",
    ]  # fmt: skip
    assert find_weak_secrets(Config(auth=AuthSettings(secrets=(good,), admin_key=good[::-1]))) == []
