"""nginx, HAProxy and Caddy with the configurations of `docs/proxies.md`, and with their default settings.

Only addresses, ports and files are replaced.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
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

DEFAULT_CONFIGURATIONS = {
    "nginx": """\
upstream catbus {
    server 127.0.0.1:8080;
}
server {
    listen 80;
    location / {
        proxy_pass http://catbus;
    }
}
""",
    "HAProxy": """\
defaults
    mode http
    timeout connect 5s
    timeout client 50s
    timeout server 50s

frontend clients
    bind :80
    default_backend replicas

backend replicas
    server replica1 127.0.0.1:8080
""",
    "Caddy": """\
:80 {
    reverse_proxy 127.0.0.1:8080
}
""",
}
"""Configurations without TLS that only name the replicas. HAProxy warns without timeouts; these are Debian's."""

NEXT_REPLICA = {"nginx": "; server ", "HAProxy": "\n    server replica2 ", "Caddy": " "}
"""The text between the addresses of two replicas in each configuration."""


@dataclass(frozen=True, slots=True)
class ProxyInstance:
    """The directory and port of a proxy, the addresses of the replicas behind it, and changes of its configuration.

    Without a certificate it has its default configuration, and no TLS.
    """

    directory: Path
    port: int
    replicas: Sequence[str]
    certificate: trustme.LeafCert | None
    changes: Mapping[str, str] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        return f"http{'' if self.certificate is None else 's'}://127.0.0.1:{self.port}"

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


def configuration(proxy: ProxyInstance, name: str, documented: Mapping[str, str], default: Mapping[str, str]) -> str:
    """The configuration of a proxy. `documented` and `default` are changes of the two."""
    replicas = {"127.0.0.1:8080": NEXT_REPLICA[name].join(proxy.replicas)}
    if proxy.certificate is None:
        return replace_all(DEFAULT_CONFIGURATIONS[name], {**replicas, **default, **proxy.changes})
    text = documented_configuration({"Caddy": "caddyfile"}.get(name, name.lower()))
    return replace_all(text, {**replicas, **documented, **proxy.changes})


def write_certificate(proxy: ProxyInstance) -> None:
    if proxy.certificate is not None:
        (proxy.directory / "tls.crt").write_bytes(b"".join(pem.bytes() for pem in proxy.certificate.cert_chain_pems))
        (proxy.directory / "tls.key").write_bytes(proxy.certificate.private_key_pem.bytes())
        (proxy.directory / "tls.pem").write_bytes(proxy.certificate.private_key_and_cert_chain_pem.bytes())


def configure_nginx(proxy: ProxyInstance) -> list[str]:
    directory = proxy.directory
    servers = configuration(
        proxy,
        "nginx",
        {"listen 443 ": f"listen 127.0.0.1:{proxy.port} ", "/etc/ssl/catbus/": f"{directory}/"},
        {"listen 80": f"listen 127.0.0.1:{proxy.port}"},
    )
    scratch = "".join(
        f"{name}_temp_path {directory}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    path = directory / "nginx.conf"
    path.write_text(
        f"{user} daemon off; pid {directory}/pid; error_log {directory}/error.log; events {{}}\n"
        f"""http {{ {scratch} log_format version '"proto":"$server_protocol","uri":"$uri"';"""
        f" access_log {proxy.log} version;\n{servers}}}\n"
    )
    return [PROGRAMS["nginx"](), "-p", str(directory), "-e", str(directory / "error.log"), "-c", str(path)]


def configure_haproxy(proxy: ProxyInstance) -> list[str]:
    text = configuration(
        proxy,
        "HAProxy",
        {
            "bind :443 ": f"bind 127.0.0.1:{proxy.port} ",
            "/etc/ssl/catbus/": f"{proxy.directory}/",
            "frontend clients\n": "frontend clients\n    log stdout format raw local0\n"
            """    log-format '"proto":"%HV","uri":"%[var(txn.path)]"'\n    http-request set-var(txn.path) path\n""",
        },
        {"bind :80": f"bind 127.0.0.1:{proxy.port}"},
    )
    path = proxy.directory / "haproxy.cfg"
    path.write_text(text)
    return [PROGRAMS["HAProxy"](), "-db", "-f", str(path)]


def configure_caddy(proxy: ProxyInstance) -> list[str]:
    site = configuration(
        proxy,
        "Caddy",
        {
            "bus.example.com {\n": f"https://127.0.0.1:{proxy.port} {{\n    bind 127.0.0.1\n"
            f"    tls {proxy.directory}/tls.crt {proxy.directory}/tls.key\n"
            f"    log {{\n        output file {proxy.log}\n    }}\n",
        },
        {":80 {\n": f"http://127.0.0.1:{proxy.port} {{\n    bind 127.0.0.1\n"},
    )
    path = proxy.directory / "Caddyfile"
    path.write_text(
        "{\n    admin off\n    auto_https disable_redirects\n    skip_install_trust\n    persist_config off\n"
        f"    storage file_system {proxy.directory}/caddy\n    servers {{\n        protocols h1 h2\n    }}\n}}\n{site}"
    )
    return [PROGRAMS["Caddy"](), "run", "--adapter", "caddyfile", "--config", str(path)]


PROXIES: Mapping[str, Callable[[ProxyInstance], list[str]]] = {
    "nginx": configure_nginx,
    "HAProxy": configure_haproxy,
    "Caddy": configure_caddy,
}
"""A function for each proxy that writes its configuration and returns its command."""


@asynccontextmanager
async def run_proxy(
    name: str,
    replicas: Sequence[str],
    certificate: trustme.LeafCert | None,
    directory: Path,
    changes: Mapping[str, str] | None = None,
    **environment: str,
) -> AsyncIterator[ProxyInstance]:
    """Run a proxy in front of the replicas at these addresses until the block ends.

    Without a certificate it has its default configuration, and no TLS. `changes` are texts to replace in its
    configuration.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    proxy = ProxyInstance(directory, port, replicas, certificate, changes or {})
    write_certificate(proxy)
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
