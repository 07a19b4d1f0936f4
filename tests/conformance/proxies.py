"""nginx, HAProxy and Caddy with the configurations of `docs/proxies.md`, changed only in where things are."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio
import trustme

from tests.programs import find_for_conformance, find_program

DOCUMENT = Path(__file__).parents[2] / "docs" / "proxies.md"

PROGRAMS: Mapping[str, Callable[[], str]] = {
    "nginx": lambda: find_program("nginx", "nginx"),
    "HAProxy": lambda: find_program("haproxy", "haproxy"),
    "Caddy": lambda: str(find_for_conformance("caddy")),
}
"""How each is found, or is said to be missing."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a proxy is told to be: its port, where the broker is, and what it shows to clients."""

    directory: Path
    port: int
    broker: str
    certificate: trustme.LeafCert

    @property
    def log(self) -> Path:
        """A line for each request that has ended, with the version of HTTP and the path in it."""
        return self.directory / "access.log"

    def output(self) -> str:
        """All that the proxy has said."""
        return "\n".join(log.read_text() for log in self.directory.glob("*.log"))

    def versions(self, path: str = "/ws") -> set[str]:
        """The versions of HTTP in which clients have asked for `path`."""
        return set(re.findall(rf'"proto":"([^"]+)".*"uri":"{path}["?]', self.log.read_text()))


def documented(language: str) -> str:
    """The configuration that `docs/proxies.md` has in this language."""
    [found] = re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    return str(found)


def changed(text: str, changes: Mapping[str, str]) -> str:
    for before, after in changes.items():
        assert before in text, before
        text = text.replace(before, after)
    return text


def nginx(place: Place) -> list[str]:
    directory = place.directory
    (directory / "tls.crt").write_bytes(b"".join(pem.bytes() for pem in place.certificate.cert_chain_pems))
    (directory / "tls.key").write_bytes(place.certificate.private_key_pem.bytes())
    servers = changed(
        documented("nginx"),
        {
            "127.0.0.1:8080": place.broker,
            "listen 443 ": f"listen 127.0.0.1:{place.port} ",
            "/etc/ssl/catbus/": f"{directory}/",
        },
    )
    scratch = "".join(
        f"{name}_temp_path {directory}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    configuration = directory / "nginx.conf"
    configuration.write_text(
        f"{user} daemon off; pid {directory}/pid; error_log {directory}/error.log; events {{}}\n"
        f"""http {{ {scratch} log_format version '"proto":"$server_protocol","uri":"$uri"';"""
        f" access_log {place.log} version;\n{servers}}}\n"
    )
    return [PROGRAMS["nginx"](), "-p", str(directory), "-e", str(directory / "error.log"), "-c", str(configuration)]


def haproxy(place: Place) -> list[str]:
    (place.directory / "tls.pem").write_bytes(place.certificate.private_key_and_cert_chain_pem.bytes())
    text = changed(
        documented("haproxy"),
        {
            "127.0.0.1:8080": place.broker,
            "bind :443 ": f"bind 127.0.0.1:{place.port} ",
            "/etc/ssl/catbus/": f"{place.directory}/",
            "frontend clients\n": "frontend clients\n    log stdout format raw local0\n"
            """    log-format '"proto":"%HV","uri":"%[var(txn.path)]"'\n    http-request set-var(txn.path) path\n""",
        },
    )
    configuration = place.directory / "haproxy.cfg"
    configuration.write_text(text)
    return [PROGRAMS["HAProxy"](), "-db", "-f", str(configuration)]


def caddy(place: Place) -> list[str]:
    (place.directory / "tls.crt").write_bytes(b"".join(pem.bytes() for pem in place.certificate.cert_chain_pems))
    (place.directory / "tls.key").write_bytes(place.certificate.private_key_pem.bytes())
    site = changed(
        documented("caddyfile"),
        {
            "127.0.0.1:8080": place.broker,
            "bus.example.com {\n": f"https://127.0.0.1:{place.port} {{\n    bind 127.0.0.1\n"
            f"    tls {place.directory}/tls.crt {place.directory}/tls.key\n"
            f"    log {{\n        output file {place.log}\n    }}\n",
        },
    )
    configuration = place.directory / "Caddyfile"
    configuration.write_text(
        "{\n    admin off\n    auto_https disable_redirects\n    skip_install_trust\n    persist_config off\n"
        f"    storage file_system {place.directory}/caddy\n    servers {{\n        protocols h1 h2\n    }}\n}}\n{site}"
    )
    return [PROGRAMS["Caddy"](), "run", "--adapter", "caddyfile", "--config", str(configuration)]


PROXIES: Mapping[str, Callable[[Place], list[str]]] = {"nginx": nginx, "HAProxy": haproxy, "Caddy": caddy}


@asynccontextmanager
async def proxying(
    name: str, broker: str, certificate: trustme.LeafCert, directory: Path, **environment: str
) -> AsyncIterator[Place]:
    """Run a proxy in front of the broker at this address, until the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = Place(directory, port, broker, certificate)
    command = PROXIES[name](place)
    async with trio.open_nursery() as nursery:
        with (place.log if name == "HAProxy" else directory / "output.log").open("ab") as output:
            run = partial(trio.run_process, stdout=output, stderr=subprocess.STDOUT, check=False)
            process = await nursery.start(partial(run, command, env={**os.environ, **environment}))
            while True:
                assert process.returncode is None, place.output()
                try:
                    await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                except OSError:
                    await trio.sleep(0.01)
                else:
                    break
            yield place
            process.terminate()
            await process.wait()
