"""nginx, HAProxy and Caddy with the configurations of `docs/proxies.md`. Only addresses and paths are replaced."""

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
"""A function for each proxy that finds its program, or skips the test."""


@dataclass(frozen=True, slots=True)
class ProxyInstance:
    """The directory, port and certificate of a proxy, and the address of the broker behind it."""

    directory: Path
    port: int
    broker: str
    certificate: trustme.LeafCert

    @property
    def log(self) -> Path:
        """The access log: a line for each finished request, with the HTTP version and the path."""
        return self.directory / "access.log"

    def output(self) -> str:
        """The contents of all log files."""
        return "\n".join(log.read_text() for log in self.directory.glob("*.log"))

    def versions(self, path: str = "/ws") -> set[str]:
        """The HTTP versions of the requests for `path`."""
        return set(re.findall(rf'"proto":"([^"]+)".*"uri":"{path}["?]', self.log.read_text()))


def documented_configuration(language: str) -> str:
    """The code block of `docs/proxies.md` in this language."""
    [found] = re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    return str(found)


def replace_all(text: str, changes: Mapping[str, str]) -> str:
    for before, after in changes.items():
        assert before in text, before
        text = text.replace(before, after)
    return text


def configure_nginx(proxy: ProxyInstance) -> list[str]:
    directory = proxy.directory
    (directory / "tls.crt").write_bytes(b"".join(pem.bytes() for pem in proxy.certificate.cert_chain_pems))
    (directory / "tls.key").write_bytes(proxy.certificate.private_key_pem.bytes())
    servers = replace_all(
        documented_configuration("nginx"),
        {
            "127.0.0.1:8080": proxy.broker,
            "listen 443 ": f"listen 127.0.0.1:{proxy.port} ",
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
        f" access_log {proxy.log} version;\n{servers}}}\n"
    )
    return [PROGRAMS["nginx"](), "-p", str(directory), "-e", str(directory / "error.log"), "-c", str(configuration)]


def configure_haproxy(proxy: ProxyInstance) -> list[str]:
    (proxy.directory / "tls.pem").write_bytes(proxy.certificate.private_key_and_cert_chain_pem.bytes())
    text = replace_all(
        documented_configuration("haproxy"),
        {
            "127.0.0.1:8080": proxy.broker,
            "bind :443 ": f"bind 127.0.0.1:{proxy.port} ",
            "/etc/ssl/catbus/": f"{proxy.directory}/",
            "frontend clients\n": "frontend clients\n    log stdout format raw local0\n"
            """    log-format '"proto":"%HV","uri":"%[var(txn.path)]"'\n    http-request set-var(txn.path) path\n""",
        },
    )
    configuration = proxy.directory / "haproxy.cfg"
    configuration.write_text(text)
    return [PROGRAMS["HAProxy"](), "-db", "-f", str(configuration)]


def configure_caddy(proxy: ProxyInstance) -> list[str]:
    (proxy.directory / "tls.crt").write_bytes(b"".join(pem.bytes() for pem in proxy.certificate.cert_chain_pems))
    (proxy.directory / "tls.key").write_bytes(proxy.certificate.private_key_pem.bytes())
    site = replace_all(
        documented_configuration("caddyfile"),
        {
            "127.0.0.1:8080": proxy.broker,
            "bus.example.com {\n": f"https://127.0.0.1:{proxy.port} {{\n    bind 127.0.0.1\n"
            f"    tls {proxy.directory}/tls.crt {proxy.directory}/tls.key\n"
            f"    log {{\n        output file {proxy.log}\n    }}\n",
        },
    )
    configuration = proxy.directory / "Caddyfile"
    configuration.write_text(
        "{\n    admin off\n    auto_https disable_redirects\n    skip_install_trust\n    persist_config off\n"
        f"    storage file_system {proxy.directory}/caddy\n    servers {{\n        protocols h1 h2\n    }}\n}}\n{site}"
    )
    return [PROGRAMS["Caddy"](), "run", "--adapter", "caddyfile", "--config", str(configuration)]


PROXIES: Mapping[str, Callable[[ProxyInstance], list[str]]] = {
    "nginx": configure_nginx,
    "HAProxy": configure_haproxy,
    "Caddy": configure_caddy,
}
"""A function for each proxy that writes its configuration and returns its command."""


@asynccontextmanager
async def run_proxy(
    name: str, broker: str, certificate: trustme.LeafCert, directory: Path, **environment: str
) -> AsyncIterator[ProxyInstance]:
    """Run a proxy in front of the broker at this address until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    proxy = ProxyInstance(directory, port, broker, certificate)
    command = PROXIES[name](proxy)
    async with trio.open_nursery() as nursery:
        with (proxy.log if name == "HAProxy" else directory / "output.log").open("ab") as output:
            run = partial(trio.run_process, stdout=output, stderr=subprocess.STDOUT, check=False)
            process = await nursery.start(partial(run, command, env={**os.environ, **environment}))
            while True:
                assert process.returncode is None, proxy.output()
                try:
                    await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                except OSError:
                    await trio.sleep(0.01)
                else:
                    break
            yield proxy
            process.terminate()
            await process.wait()
