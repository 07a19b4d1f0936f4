"""`catbus check`: check the configuration and the environment of a broker before it starts."""

from __future__ import annotations

import errno
import http.client
import os
import resource
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import msgspec
import trio
from cryptography import x509

from ...certificates import CertificateSource
from ...config import (
    SECRET_COMMAND,
    Config,
    LoadedConfig,
    find_weak_secrets,
    load_with_sources,
    show_setting,
    split_address,
)
from ...endpoints.open_files import connections_within_limit
from ...errors import ConfigError
from ...postgres.access.database_checks import CheckResult, ReportResult, check_database
from ...postgres.embedded.installations import find_installation
from ...postgres.embedded.server import running_url
from ...protocol.wire_messages import to_json
from ..database_access import embedded_directory
from ..shared_options import config_option, database_option, state_option
from ..workers import worker_count

RENEWAL_PERIOD = timedelta(days=14)
"""A certificate that expires within this time should have been renewed."""
HEALTH_REQUEST_TIMEOUT = 2.0
"""Seconds to wait for a reply of the process that listens on a port."""
ALREADY_SERVED = "a broker is already running there"


@click.command("check", short_help="Check the configuration before a broker starts.")
@config_option
@database_option
@state_option
@click.option("--strict", is_flag=True, help="Treat warnings as errors.")
@click.option("--json", "as_json", is_flag=True, help="Write one line of JSON per result, for scripts.")
def command(config: Path | None, database: str | None, state: str | None, strict: bool, as_json: bool) -> None:
    """Check the configuration, the secret, the certificate, the ports and the database.

    Reads the same sources as `catbus run`, changes nothing, and shows how to fix each problem. Exits with 1 if a broker
    could not start.

    \b
    Examples:
      catbus check --config catbus.toml
      kubectl exec deploy/catbus -- catbus check
    """
    levels: set[str] = set()

    def report(finding: CheckResult) -> None:
        levels.add(finding.level)
        click.echo(to_json(asdict(finding)).decode() if as_json else _format_finding(finding))

    _check_all(config, {"database.url": database, "state": state}, report)
    if "error" in levels or (strict and "warning" in levels):
        raise click.exceptions.Exit(1)


def _format_finding(finding: CheckResult) -> str:
    advice = f"\n{'':9}{'':15}{finding.advice}" if finding.advice else ""
    return f"{finding.level:<9}{finding.name:<15}{finding.text}{advice}"


def _check_all(path: Path | None, given: Mapping[str, object], report: ReportResult) -> None:
    try:
        reading = load_with_sources(path, os.environ, given)
    except ConfigError as error:
        report(CheckResult("error", "configuration", str(error)))
        return
    config = reading.config
    report(CheckResult("ok", "configuration", f"{path or 'no file'}, and the environment"))
    for finding in _check_settings(reading):
        report(finding)
    for check in (_check_workers, _check_secret, _check_certificate, _check_ports, _check_open_files, _show_limits):
        for finding in check(config):
            report(finding)
    _check_database(reading, report)


def _check_settings(reading: LoadedConfig) -> Iterator[CheckResult]:
    """Yield the settings without their defaults, with their sources, and the variables that have no effect."""
    for name, source in sorted(reading.sources.items()):
        yield CheckResult("ok", "setting", f"{name} = {show_setting(reading.config, name)} ({source})")
    for text in reading.warnings:
        yield CheckResult("warning", "environment", text, "correct its name, or unset it")


def _check_workers(config: Config) -> Iterator[CheckResult]:
    try:
        count = worker_count(config)
    except ConfigError as error:
        yield CheckResult("error", "workers", str(error))
        return
    if count > 1:
        yield CheckResult("ok", "workers", f"{count} processes, each with the limits below")


def _check_secret(config: Config) -> Iterator[CheckResult]:
    secrets, weak = config.auth.secrets, find_weak_secrets(config)
    if not secrets and not config.loopback:
        advice = f"set CATBUS_SECRET, for example to the output of `{SECRET_COMMAND}`"
        yield CheckResult("error", "secret", "there is none, but other machines can reach this broker", advice)
    elif not secrets:
        yield CheckResult("ok", "secret", "the broker creates one, because only this machine can reach it")
    elif not weak:
        yield CheckResult("ok", "secret", f"{len(secrets)} configured")
    tolerated = config.loopback or config.auth.allow_weak_secrets
    for text in weak:
        yield CheckResult("warning" if tolerated else "error", "secret", text, f"use the output of `{SECRET_COMMAND}`")


def _check_certificate(config: Config) -> Iterator[CheckResult]:
    if not config.certificate_needed:
        if config.webtransport.bind:
            advice = "set CATBUS_CERT and CATBUS_KEY to the certificate and its key"
            yield CheckResult("warning", "certificate", "there is none, so WebTransport is disabled", advice)
        return
    if config.webtransport.cert is None:
        yield CheckResult("ok", "certificate", "the broker creates one, because only this machine can reach it")
        return
    now = datetime.now(UTC)
    try:
        found = CertificateSource(config.webtransport, config.state_directory, now).current(now).quic.certificate
    except ConfigError as error:
        yield CheckResult("error", "certificate", str(error))
        return
    assert found is not None
    names = _certificate_names(found)
    left = found.not_valid_after_utc - now
    text = f"for {', '.join(names) or 'no host'}, valid until {found.not_valid_after_utc:%Y-%m-%d}"
    if left <= timedelta(0):
        yield CheckResult("error", "certificate", f"expired: {text}", "renew it")
    elif found.not_valid_before_utc > now:
        yield CheckResult("error", "certificate", f"not valid yet: {text}", "check the clock of this machine")
    elif not names:
        yield CheckResult(
            "error", "certificate", "it names no host (subjectAltName)", "clients check only subjectAltName"
        )
    elif left < RENEWAL_PERIOD:
        yield CheckResult("warning", "certificate", text, "renew it; a running broker loads the new one automatically")
    else:
        yield CheckResult("ok", "certificate", text)


def _certificate_names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _check_ports(config: Config) -> Iterator[CheckResult]:
    udp = config.webtransport.bind if config.webtransport_served else ()
    kinds = ((socket.SOCK_STREAM, "TCP", config.websocket.bind), (socket.SOCK_DGRAM, "UDP", udp))
    serving = False
    for kind, name, addresses in kinds:
        for address in addresses:
            finding = _check_port(kind, name, address, serving, tls=config.websocket.tls)
            serving = serving or finding.text.endswith(ALREADY_SERVED)
            yield finding


def _check_port(kind: socket.SocketKind, name: str, address: str, serving: bool, *, tls: bool) -> CheckResult:
    """Check whether a port can be bound. `serving`: another port belongs to a running broker, so this one does, too."""
    host, port = split_address(address)
    place = f"{name} {address}"
    try:
        family, _, protocol, _, target = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, protocol) as sock:
            if kind is socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(target)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return _check_port_in_use(kind, place, host, port, serving, tls=tls)
        advice = "ports below 1024 require a privilege" if error.errno == errno.EACCES else "check the address"
        return CheckResult("error", "port", f"{place}: {error.strerror}", advice)
    return CheckResult("ok", "port", f"{place} is available")


def _check_port_in_use(
    kind: socket.SocketKind, place: str, host: str, port: int, serving: bool, *, tls: bool
) -> CheckResult:
    """Check who uses a port. A running broker is not an error, because the command can run beside it."""
    advice = "stop the process that uses it, or bind another port (CATBUS_WS_BIND, CATBUS_BIND)"
    if kind is socket.SOCK_DGRAM:
        text = f"{place}: {ALREADY_SERVED}" if serving else f"{place} is in use by an unknown process"
        return CheckResult("ok", "port", text) if serving else CheckResult("error", "port", text, advice)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection = http.client.HTTPConnection(host, port, timeout=HEALTH_REQUEST_TIMEOUT)
    if tls:
        # The certificate is not verified: it does not show which process uses the port.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, timeout=HEALTH_REQUEST_TIMEOUT, context=context)
    try:
        connection.request("GET", "/health")
        if connection.getresponse().read(16) == b"ok":
            return CheckResult("ok", "port", f"{place}: {ALREADY_SERVED}")
    except (OSError, http.client.HTTPException):
        pass
    finally:
        connection.close()
    return CheckResult("error", "port", f"{place} is in use by another program", advice)


def _check_open_files(config: Config) -> Iterator[CheckResult]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = config.limits.connections
    possible = connections_within_limit(wanted, files)
    if possible < wanted:
        text = f"{files:,} open files allow {possible:,} of {wanted:,} connections (limits.connections)"
        yield CheckResult(
            "warning", "files", text, "raise the hard limit of open files (ulimit -Hn), or lower limits.connections"
        )


def _show_limits(config: Config) -> Iterator[CheckResult]:
    """Yield the limits of one client and of one address."""
    limits, proxies = config.limits, config.websocket.trusted_proxies
    text = (
        f"a client: {limits.publish_rate:,} messages and {limits.publish_bytes:,} bytes per second unless its token "
        f"has other rates, {limits.sessions:,} sessions; an address: {limits.address_connections:,} of "
        f"{limits.connections:,} connections; trusted proxies: {', '.join(proxies) or 'none'}"
    )
    yield CheckResult("ok", "limits", text)


def _check_database(reading: LoadedConfig, report: ReportResult) -> None:
    config = reading.config
    settings = config.database
    if settings.url == "memory":
        text = "in memory: the log ends with the process, and replicas cannot share it"
        not_chosen = not config.loopback and "database.url" not in reading.sources
        advice = "set DATABASE_URL to keep the log" + (", or to memory if that is intended" if not_chosen else "")
        report(CheckResult("error" if not_chosen else "warning", "database", text, advice))
        return
    if settings.url == "embedded":
        directory = embedded_directory(config)
        url = running_url(directory)
        if url is None:
            try:
                report(CheckResult("ok", "database", f"embedded in {directory}, not running; {find_installation()}"))
            except ConfigError as error:
                report(CheckResult("error", "database", str(error)))
            return
        settings = msgspec.structs.replace(settings, url=url)
    trio.run(check_database, settings, report)
