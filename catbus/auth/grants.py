"""Identities and grants: the client that a token names, and what this client may read and write."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import ClassVar

from ..protocol.channels import is_reserved, selectors


@dataclass(frozen=True, slots=True)
class Grants:
    """The patterns that a client may read, and those that it may write."""

    ALL: ClassVar[Grants]
    """All channels, to read and to write, except reserved ones."""

    ADMIN: ClassVar[Grants]
    """The grants of the admin key: `ALL`, and the broker's own channels to read."""

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    _readable: frozenset[str] = field(init=False, repr=False, compare=False)
    _writable: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_readable", frozenset(self.read))
        # Nobody may write to a reserved channel, and `*` matches none of them.
        object.__setattr__(self, "_writable", frozenset(each for each in self.write if not is_reserved(each)))

    def __str__(self) -> str:
        """A text for people: `read and write a.*`, or `read a, b.* and write c`."""
        if self.read == self.write and self.read:
            return f"read and write {', '.join(self.read)}"
        parts = [("read", self.read), ("write", self.write)]
        return " and ".join(f"{verb} {', '.join(patterns)}" for verb, patterns in parts if patterns) or "nothing"

    def may_read(self, pattern: str) -> bool:
        """Whether one grant covers the whole of a valid pattern."""
        return not self._readable.isdisjoint(selectors(pattern))

    def may_write(self, channel: str) -> bool:
        """Whether a grant covers a valid channel. Nobody may write to a reserved one, whatever the grants are."""
        return not self._writable.isdisjoint(selectors(channel))


Grants.ALL = Grants(("*",), ("*",))
Grants.ADMIN = Grants(("*", "_catbus.*"), ("*",))


@dataclass(frozen=True, slots=True)
class Identity:
    """The client that a token names, and what it may do.

    `expires` and `issued` are in seconds since 1970. Without `expires` the token does not expire; a token that does not
    say when it was issued counts as issued at 0, and none as issued after it was verified. `role` is the key of the
    role that a role token stands for. `publish_rate` (messages per second) and `publish_bytes` (bytes per second)
    replace the broker's limits, unless they are None.
    """

    client_id: str | None
    grants: Grants
    expires: float | None
    admin: bool = False
    role: bytes | None = None
    publish_rate: int | None = None
    publish_bytes: int | None = None
    issued: float = 0.0


def client_of(identity: Identity, token: str, network: str) -> Hashable:
    """The key under which a client shares the log, the CPU and the limits: its client_id, if it has one.

    Otherwise the key is the token together with the network. A page may give one token to all its visitors, and one
    machine is one client, however many sessions it opens. The signature, after the last dot, is left out: the same
    signature can be written in several ways.
    """
    if identity.client_id:
        return identity.client_id
    signed = (token.rpartition(".")[0] or token).encode(errors="surrogatepass")
    return blake2b(signed, digest_size=16, person=b"catbus client").digest(), network
