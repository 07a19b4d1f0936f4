"""The manifests without a cluster: pods as processes, and the parts of Kubernetes around them.

A pod has its own address (127.0.1.N), the container's ports, its environment with the values of Secrets and volumes,
and its probes. In front of the pods is HAProxy in place of the Ingress, with the rules of the Ingress. Behind them is
PgBouncer with the overlay's configuration.

Differences from a cluster: the pods share this machine's network, so they get their addresses by `CATBUS_WS_BIND` and
`CATBUS_BIND`; its file system, to which they could write; and its users.
"""

from __future__ import annotations

import itertools
import os
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trio
import trustme

from catbus.client import Disconnected, Transport
from catbus.client.broker_address import parse_address
from catbus.client.websocket_transport import open_websocket
from catbus.client.webtransport_transport import make_configuration, open_webtransport
from tests.k8s.image import instructions
from tests.k8s.manifests import find_document, render
from tests.k8s.rules import catbus_container, pod_of
from tests.postgres.proxy import _target
from tests.programs import find_program
from tests.volumes import Volume

Probe = dict[str, Any]

ADDRESSES = [f"127.0.1.{number}" for number in range(1, 10)]
POOLER = "127.0.2.1"
INGRESS = "127.0.3.1"
START_TIMEOUT = 30.0
DEFAULTS = {"periodSeconds": 10, "timeoutSeconds": 1, "failureThreshold": 3, "initialDelaySeconds": 0}
"""The defaults of Kubernetes for a probe."""


class Pod:
    """One replica of the Deployment's template. `run` runs it and does the kubelet's part."""

    def __init__(self, name: str, address: str, spec: dict[str, Any], environment: Mapping[str, str], command: Path):
        self.name = name
        self.address = address
        self.ready = False
        self.ending = False
        self.status: int | None = None
        self.stopped_in = 0.0
        """Seconds from the deletion of the pod to its end."""
        self.failures: list[str] = []
        """The reasons for which a kubelet would have restarted it."""
        self._spec = spec
        [self._container] = spec["containers"]
        self._environment = environment
        self._command = [str(command), "run"]
        self._process: trio.Process | None = None

    async def run(self, log: Path) -> None:
        with log.open("ab") as output:
            self._process = await trio.lowlevel.open_process(
                self._command, env=dict(self._environment), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        async with trio.open_nursery() as kubelet:
            kubelet.start_soon(self._probe)
            try:
                self.status = await self._process.wait()
            finally:
                self.ready = False
                if self._process.returncode is None:
                    self._process.kill()
                    with trio.CancelScope(shield=True):
                        await self._process.wait()
                kubelet.cancel_scope.cancel()
        if not self.ending:
            self.failures.append(f"ended by itself with status {self.status}")

    async def delete(self) -> None:
        """End the pod: take it out of rotation, then preStop, SIGTERM, and at last SIGKILL."""
        began = trio.current_time()
        self.ending, self.ready = True, False
        process = self._process
        assert process is not None
        with trio.move_on_after(self._spec["terminationGracePeriodSeconds"]):
            await trio.run_process(self._container["lifecycle"]["preStop"]["exec"]["command"])
            process.terminate()
            await process.wait()
        if process.returncode is None:
            self.failures.append("did not end within its grace period")
            process.kill()
            await process.wait()
        self.stopped_in = trio.current_time() - began

    async def _probe(self) -> None:
        container = self._container
        await self._until("startupProbe", success=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_readiness, DEFAULTS | container["readinessProbe"])
            await self._until("livenessProbe", success=False)

    async def _until(self, name: str, *, success: bool) -> None:
        """Probe until `success`, or until the probe has failed so often that a kubelet would restart the pod."""
        probe, failed = DEFAULTS | self._container[name], 0
        await trio.sleep(probe["initialDelaySeconds"])
        while True:
            if await self._request(probe):
                failed = 0
                if success:
                    return
            else:
                failed += 1
                if failed >= probe["failureThreshold"]:
                    self.failures.append(f"{name} failed {failed} times")
                    return
            await trio.sleep(probe["periodSeconds"])

    async def _watch_readiness(self, probe: Probe) -> None:
        failed = 0
        while True:
            if await self._request(probe):
                self.ready, failed = not self.ending, 0
            else:
                failed += 1
                self.ready = self.ready and failed < probe["failureThreshold"]
            await trio.sleep(probe["periodSeconds"])

    async def _request(self, probe: Probe) -> bool:
        """The kubelet's HTTP probe, which succeeds with any status from 200 to 399."""
        wanted = probe["httpGet"]
        [port] = [p["containerPort"] for p in self._container["ports"] if p["name"] == wanted["port"]]
        head = f"GET {wanted['path']} HTTP/1.1\r\nHost: {self.address}:{port}\r\nConnection: close\r\n\r\n"
        with trio.move_on_after(probe["timeoutSeconds"]), suppress(OSError, trio.BrokenResourceError, IndexError):
            async with await trio.open_tcp_stream(self.address, port) as stream:
                await stream.send_all(head.encode())
                response = b"".join([data async for data in stream])
            return 200 <= int(response.split(b" ", 2)[1]) < 400
        return False


class Ingress:
    """HAProxy with TLS for the clients and the rules of the rendered Ingress."""

    def __init__(self, directory: Path, certificate: bytes) -> None:
        spec = find_document(render("overlays/ingress"), "Ingress", "catbus-websocket")["spec"]
        [path] = spec["rules"][0]["http"]["paths"]
        with socket.socket() as free:
            free.bind((INGRESS, 0))
            self.port = free.getsockname()[1]
        (directory / "tls.pem").write_bytes(certificate)
        self._control = directory / "control"
        self._states: dict[str, str] = {}
        configuration = directory / "haproxy.cfg"
        configuration.write_text(
            f"global\n  stats socket {self._control} mode 600 level admin\n"
            "defaults\n  mode http\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n"
            "  timeout tunnel 1h\n  retries 1\n  option redispatch\n"
            f"frontend clients\n  bind {INGRESS}:{self.port} ssl crt {directory / 'tls.pem'}\n"
            f"  http-request deny unless {{ path_beg {path['path']} }}\n  default_backend pods\n"
            "backend pods\n  balance leastconn\n"
            + "".join(f"  server {address} {address}:{self.backend} disabled\n" for address in ADDRESSES)
        )
        self._command = [find_program("haproxy", "haproxy"), "-q", "-db", "-f", str(configuration)]

    @property
    def backend(self) -> int:
        """The port of the pods to which the Service leads."""
        documents = render("overlays/ingress")
        [port] = find_document(documents, "Service", "catbus-ws")["spec"]["ports"]
        ports = {p["name"]: p["containerPort"] for p in catbus_container(documents)["ports"]}
        number: int = ports[port["targetPort"]]
        return number

    async def run(self, pods: Mapping[str, Pod]) -> None:
        """Serve. Pods that are not ready get no new connections and keep their present ones."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.run_process, self._command)
            while True:
                for pod in list(pods.values()):
                    await self._set(pod.address, "ready" if pod.ready else "drain")
                await trio.sleep(0.05)

    async def _set(self, server: str, state: str) -> None:
        if self._states.get(server) == state:
            return
        with suppress(OSError):
            async with await trio.open_unix_socket(str(self._control)) as stream:
                await stream.send_all(f"set server pods/{server} state {state}\n".encode())
                assert await stream.receive_some() == b"\n"
                self._states[server] = state

    async def dial(self, context: ssl.SSLContext) -> Transport:
        return await open_websocket(parse_address(f"wss://{INGRESS}:{self.port}/ws"), context)


class Pooler:
    """PgBouncer with the overlay's configuration, except for its address and that of its database."""

    def __init__(self, directory: Path, database_url: str, certificate: bytes) -> None:
        parts = urlsplit(database_url)
        target = _target(database_url)
        host, port = target if isinstance(target, tuple) else target.rsplit("/.s.PGSQL.", 1)
        [config] = [d for d in render("overlays/pgbouncer") if d["kind"] == "ConfigMap"]
        text: str = config["data"]["pgbouncer.ini"]
        for before, after in {
            "host=postgres port=5432 dbname=catbus": f"host={host} port={port} dbname={parts.path[1:]}",
            "listen_addr = *": f"listen_addr = {POOLER}",
            "/etc/pgbouncer/auth": str(directory),
            "/etc/pgbouncer/tls": str(directory),
        }.items():
            assert before in text
            text = text.replace(before, after)
        directory.chmod(0o755)
        (directory / "userlist.txt").write_text(f'"{parts.username}" "{parts.password}"\n')
        for name in ("tls.crt", "tls.key"):
            (directory / name).write_bytes(certificate)
        (directory / "pgbouncer.ini").write_text(text)
        user = ["-u", "postgres"] if os.getuid() == 0 else []
        self._command = [find_program("pgbouncer", "pgbouncer"), "-q", *user, str(directory / "pgbouncer.ini")]
        self.url = f"postgres://{parts.username}:{parts.password}@{POOLER}:6432/catbus?sslmode=require"

    async def run(self) -> None:
        await trio.run_process(self._command)


class Cluster:
    """The pods, by name, with the Secrets that `kubectl create secret` would make."""

    def __init__(self, directory: Path, command: Path, database_url: str, secret: str) -> None:
        documents = render("overlays/pgbouncer")
        self.deployment = find_document(documents, "Deployment", "catbus")
        self.authority = trustme.CA()
        self.pods: dict[str, Pod] = {}
        self.all: list[Pod] = []
        """All pods, including those that have ended."""
        self._directory = directory
        self._command = command
        self._names = (f"catbus-{number}" for number in itertools.count(1))
        self._dialled = 0
        for name in ("pooler", "ingress"):
            (directory / name).mkdir()
        self.pooler = Pooler(directory / "pooler", database_url, self._certificate(POOLER))
        self.ingress = Ingress(directory / "ingress", self._certificate(INGRESS, "catbus.example.com"))
        self.tls = Volume(directory / "tls")
        self.renew()
        self._secrets = {
            "catbus-secrets": {"database-url": self.pooler.url, "token-secret": secret, "listen-url": database_url}
        }
        self._context = ssl.create_default_context(cadata=self._authority_pem)

    @property
    def _authority_pem(self) -> str:
        return self.authority.cert_pem.bytes().decode()

    def _certificate(self, *names: str) -> bytes:
        return self.authority.issue_cert(*names).private_key_and_cert_chain_pem.bytes()

    def renew(self) -> None:
        """Put a new certificate into the Secret, as cert-manager does, and into the pods, as the kubelet does."""
        issued = self.authority.issue_cert(*ADDRESSES)
        self.tls.put({"tls.crt": issued.cert_chain_pems[0].bytes(), "tls.key": issued.private_key_pem.bytes()})

    def _environment(self, address: str) -> dict[str, str]:
        """The container's environment, with the values of references and the paths of mounted volumes."""
        container = catbus_container([self.deployment])
        [mount] = container["volumeMounts"]
        found = {}
        for env in container["env"]:
            reference = env.get("valueFrom", {}).get("secretKeyRef")
            value = self._secrets[reference["name"]][reference["key"]] if reference else env["value"]
            found[env["name"]] = value.replace(mount["mountPath"], str(self.tls.directory))
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        found["CATBUS_WS_BIND"] = f"{address}:{ports['websocket']}"
        found["CATBUS_BIND"] = f"{address}:{ports['webtransport']}"
        image = dict(part.split("=", 1) for text in instructions("ENV") for part in text.split() if "=" in part)
        found |= {name: value for name, value in image.items() if name.startswith("PYTHON")}
        found["PATH"] = f"{self._command.parent}:{os.defpath}"
        return found

    async def _create(self, nursery: trio.Nursery) -> Pod:
        name = next(self._names)
        taken = {pod.address for pod in self.pods.values()}
        address = next(each for each in ADDRESSES if each not in taken)
        spec = pod_of(self.deployment)["spec"]
        pod = self.pods[name] = Pod(name, address, spec, self._environment(address), self._command)
        self.all.append(pod)
        nursery.start_soon(pod.run, self._directory / f"{name}.log")
        with trio.fail_after(START_TIMEOUT):
            while not pod.ready:
                assert not pod.failures, (pod.failures, (self._directory / f"{name}.log").read_text())
                await trio.sleep(0.02)
        return pod

    async def _delete(self, pod: Pod) -> None:
        await pod.delete()
        del self.pods[pod.name]

    async def open(self, nursery: trio.Nursery) -> None:
        """Start all parts, and wait until every replica is ready."""
        nursery.start_soon(self.pooler.run)
        nursery.start_soon(self.ingress.run, self.pods)
        self._nursery = nursery
        async with trio.open_nursery() as starting:
            for _ in range(self.deployment["spec"]["replicas"]):
                starting.start_soon(self._create, nursery)
                await trio.sleep(0.01)

    async def restart(self) -> None:
        """Do `kubectl rollout restart`: replace pods one by one, each new one ready before an old one ends."""
        assert self.deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
        async with trio.open_nursery() as ending:
            for pod in list(self.pods.values()):
                await self._create(self._nursery)
                ending.start_soon(self._delete, pod)

    async def dial(self, transport: str) -> Transport:
        """Connect over WebSocket as a client outside, or over WebTransport as a service inside.

        The service uses `catbus-wt-headless`, for which DNS returns the addresses of ready pods.
        """
        if transport == "websocket":
            return await self.ingress.dial(self._context)
        ready = [pod for pod in self.pods.values() if pod.ready]
        if not ready:
            raise Disconnected("the name has no addresses")
        self._dialled += 1
        address = parse_address(f"https://{ready[self._dialled % len(ready)].address}:4433/")
        return await open_webtransport(address, make_configuration(address, self._authority_pem))


@asynccontextmanager
async def open_cluster(command: Path, database_url: str, secret: str, directory: Path) -> AsyncIterator[Cluster]:
    """Run the manifests. `command` is the image's `catbus`."""
    cluster = Cluster(directory, command, database_url, secret)
    async with trio.open_nursery() as nursery:
        await cluster.open(nursery)
        yield cluster
        nursery.cancel_scope.cancel()
