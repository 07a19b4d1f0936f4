"""`GET /catbus.js`: the modules of the JavaScript client."""

from __future__ import annotations

from functools import cache
from hashlib import blake2b
from importlib import resources

from ..replica_interface import ReplicaInterface
from .http_request import HttpRequest
from .http_response import HttpResponse


async def serve_javascript(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Answer with a module of the JavaScript client, for pages of any origin.

    A browser revalidates it each time, because modules of two releases do not work together.
    """
    body, tag = javascript_modules()[request.path]
    headers = [(b"cache-control", b"no-cache"), (b"etag", tag)]
    known = [each.strip().removeprefix(b"W/") for each in request.header(b"if-none-match").split(b",")]
    if tag in known or known == [b"*"]:
        return HttpResponse(304, b"", headers)
    return HttpResponse(200, body, headers, b"text/javascript; charset=utf-8")


@cache
def javascript_modules() -> dict[str, tuple[bytes, bytes]]:
    """Return the modules of the JavaScript client by path, each with its entity tag."""
    static = resources.files("catbus") / "static"
    files = {"/catbus.js": static / "catbus.js"}
    files |= {f"/catbus/{file.name}": file for file in (static / "catbus").iterdir() if file.name.endswith(".js")}
    bodies = {path: file.read_bytes() for path, file in files.items()}
    return {path: (body, b'"%b"' % blake2b(body, digest_size=12).hexdigest().encode()) for path, body in bodies.items()}
