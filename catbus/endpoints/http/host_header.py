"""The `Host` header of a request."""

from __future__ import annotations

import ipaddress
import re

_HOST = re.compile(r"(?P<host>\[(?P<v6>[0-9a-fA-F:.]{2,45})\]|[0-9a-zA-Z._-]{1,253})(?::(?P<port>[0-9]{1,5}))?")


def host_name(host: str) -> str | None:
    """Return a Host header without its port (an IPv6 address keeps its brackets), or None if it is not valid."""
    match = _HOST.fullmatch(host)
    if match is None or not 0 < int(match["port"] or 1) <= 65_535:
        return None
    if match["v6"]:
        try:
            ipaddress.IPv6Address(match["v6"])
        except ValueError:
            return None
    return match["host"]
