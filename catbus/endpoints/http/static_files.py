"""The files that the broker serves: the modules of the JavaScript client, and the console."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import blake2b
from importlib import resources
from importlib.resources.abc import Traversable

from ..replica_interface import ReplicaInterface
from .forwarded_headers import forwarded_origin
from .http_request import HttpRequest
from .http_response import HttpResponse

MEDIA_TYPES = {
    ".css": b"text/css; charset=utf-8",
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self' {sockets}; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types"
)
"""The Content-Security-Policy of the console. Not in all browsers does 'self' include the WebSockets of the origin."""


@dataclass(frozen=True)
class StaticFile:
    """A file: its body, its entity tag without quotes, and its media type."""

    plain: bytes
    tag: bytes
    type: bytes

    @cached_property
    def compressed(self) -> bytes:
        """The body in gzip. It is made for the first client that wants it: compressing all files takes 20 ms."""
        return gzip.compress(self.plain, mtime=0)


async def serve_javascript(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Answer with a module of the JavaScript client, for pages of any origin."""
    return _serve(javascript_modules()[request.path], request)


async def serve_console(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Answer with a file of the console. Its page may connect to this broker alone, and no other page may frame it."""
    _, host = forwarded_origin(request, tls=replica.config.websocket.tls)
    policy = POLICY.format(sockets=f"ws://{host} wss://{host}" if host else "")
    headers = [
        (b"content-security-policy", policy.encode()),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
    ]
    response = _serve(console_files()[request.path], request)
    return HttpResponse(response.status, response.body, [*response.headers, *headers], response.type)


def _serve(file: StaticFile, request: HttpRequest) -> HttpResponse:
    """Answer with a file, which a browser revalidates each time: modules of two releases do not work together."""
    zipped = b"gzip" in [each.strip() for each in request.header(b"accept-encoding").split(b",")]
    # RFC 9110, section 8.8.3: representations with different encodings have different tags.
    tag = b'"%b%b"' % (file.tag, b"-gzip" if zipped else b"")
    headers = [(b"cache-control", b"no-cache"), (b"etag", tag), (b"vary", b"accept-encoding")]
    known = [each.strip().removeprefix(b"W/") for each in request.header(b"if-none-match").split(b",")]
    if tag in known or known == [b"*"]:
        return HttpResponse(304, b"", headers)
    if zipped:
        return HttpResponse(200, file.compressed, [*headers, (b"content-encoding", b"gzip")], file.type)
    return HttpResponse(200, file.plain, headers, file.type)


@cache
def javascript_modules() -> Mapping[str, StaticFile]:
    """Return the modules of the JavaScript client by path."""
    static = resources.files("catbus") / "static"
    files = {f"/catbus/{name}": file for name, file in _files_below(static / "catbus") if name.endswith(".js")}
    return {path: _load(file) for path, file in {"/catbus.js": static / "catbus.js", **files}.items()}


@cache
def console_files() -> Mapping[str, StaticFile]:
    """Return the files of the console by path. Its page has the path `/console`."""
    files = {f"/console/{name}": file for name, file in _files_below(resources.files("catbus") / "static" / "console")}
    files["/console"] = files.pop("/console/index.html")
    return {path: _load(file) for path, file in files.items()}


def _files_below(directory: Traversable) -> list[tuple[str, Traversable]]:
    found: list[tuple[str, Traversable]] = []
    for entry in directory.iterdir():
        if entry.is_dir():
            found += [(f"{entry.name}/{name}", file) for name, file in _files_below(entry)]
        else:
            found.append((entry.name, entry))
    return found


def _load(file: Traversable) -> StaticFile:
    body = file.read_bytes()
    tag = blake2b(body, digest_size=12).hexdigest().encode()
    return StaticFile(body, tag, MEDIA_TYPES[file.name[file.name.rindex(".") :]])
