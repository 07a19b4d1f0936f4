"""UDP sockets that send several datagrams in one system call where the kernel can (UDP_SEGMENT)."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

import trio

from ...config import join_address, split_address
from ...errors import ConfigError
from ...webtransport.connectionless_packets import MAX_PACKET_SIZE

SOCKET_BUFFER_SIZE = 4 << 20
"""Requested bytes of the receive and send buffers; the kernel may give less. All connections share them."""

_UDP_SEGMENT = 103
_IP_PKTINFO = 8
_IPV6_PKTINFO = 50
_IPV6_RECVPKTINFO = 49
_CONTROL = socket.CMSG_SPACE(20)
_WILDCARD = {
    "0.0.0.0": (socket.IPPROTO_IP, _IP_PKTINFO),
    "::": (socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO),
}
"""Wildcard addresses, and the socket option that makes the kernel report which local address a datagram was sent to."""
_MAX_SEGMENTS = 64
_MAX_SENDMSG_BYTES = 65_000
SourceAddress = tuple[tuple[int, int, bytes], ...]

_NO_SEGMENTING = (errno.EIO, errno.EINVAL, errno.ENOPROTOOPT, errno.EOPNOTSUPP)


class PeerAddress(NamedTuple):
    """The socket that a peer sends to, and the address of the peer."""

    socket: UdpSocket
    address: tuple[str, int]
    source: SourceAddress = ()
    """The local address that the peer sends to, as `sendmsg` takes it; empty if the socket has a single address."""


class UdpSocket:
    """A UDP socket. Sending never waits: datagrams that the kernel does not take are lost, as on any network."""

    __slots__ = (
        "_segmenting",
        "_socket",
        "_wildcard",
        "address",
        "received",
        "received_bytes",
        "send_failures",
        "sent",
        "sent_bytes",
    )

    def __init__(self, sock: socket.socket) -> None:
        host, port = sock.getsockname()[:2]
        self.address = join_address(host, port)
        self.received = 0
        self.sent = 0
        self.send_failures = 0
        self.received_bytes = 0
        self.sent_bytes = 0
        self._socket = sock
        self._segmenting = hasattr(sock, "sendmsg")
        self._wildcard = host in _WILDCARD
        """Whether it has several local addresses. Peers accept replies only from the address that they sent to."""
        if self._wildcard:
            sock.setsockopt(*_WILDCARD[host], 1)

    async def wait(self) -> None:
        """Wait until a datagram has arrived."""
        await trio.lowlevel.wait_readable(self._socket)

    def receive(self, most: int) -> list[tuple[bytes, PeerAddress]]:
        """Return up to `most` received datagrams. A truncated one is still longer than `MAX_PACKET_SIZE`."""
        datagrams: list[tuple[bytes, PeerAddress]] = []
        sock = self._socket
        try:
            if self._wildcard:
                while len(datagrams) < most:
                    data, control, _, address = sock.recvmsg(MAX_PACKET_SIZE + 1, _CONTROL)
                    datagrams.append((data, PeerAddress(self, address, _source(control))))
            else:
                recvfrom = sock.recvfrom
                while len(datagrams) < most:
                    data, address = recvfrom(MAX_PACKET_SIZE + 1)
                    datagrams.append((data, PeerAddress(self, address)))
        except OSError:
            pass  # No datagram is left, or an ICMP error about a sent one, which the timers of QUIC handle.
        self.received += len(datagrams)
        self.received_bytes += sum([len(data) for data, _ in datagrams])
        return datagrams

    def send(self, datagrams: Sequence[bytes], to: PeerAddress) -> None:
        """Send to one peer. All datagrams must have one size, but the last may be smaller."""
        self.sent += len(datagrams)
        self.sent_bytes += sum([len(data) for data in datagrams])
        _, address, source = to
        if self._segmenting and len(datagrams) > 1:
            size = struct.pack("H", len(datagrams[0]))
            try:
                self._socket.sendmsg(datagrams, [(socket.IPPROTO_UDP, _UDP_SEGMENT, size), *source], 0, address)
            except OSError as error:
                if error.errno not in _NO_SEGMENTING:
                    self.send_failures += len(datagrams)
                    return
                # The kernel or the network card cannot do it, and never will.
                self._segmenting = False
            else:
                return
        for data in datagrams:
            try:
                if source:
                    self._socket.sendmsg((data,), source, 0, address)
                else:
                    self._socket.sendto(data, address)
            except OSError:
                self.send_failures += 1

    def close(self) -> None:
        self._socket.close()


def _source(control: Sequence[tuple[int, int, bytes]]) -> SourceAddress:
    """Return the destination of a datagram as the source of its replies (Linux: ip(7), ipv6(7))."""
    for level, kind, data in control:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            # The routing table chooses the interface, as without this option.
            return ((level, kind, bytes(4) + data[4:8] + bytes(4)),)
        if (level, kind) == (socket.IPPROTO_IPV6, _IPV6_PKTINFO):
            # A link-local address is valid only with its interface.
            interface = data[16:20] if data[:2] == b"\xfe\x80" else bytes(4)
            return ((level, kind, data[:16] + interface),)
    return ()


def send_datagrams(datagrams: Sequence[tuple[bytes, PeerAddress]]) -> None:
    """Send the datagrams of one connection in as few system calls as possible."""
    start, count = 0, len(datagrams)
    while start < count:
        data, peer_address = datagrams[start]
        size = len(data)
        end, limit = start + 1, min(count, start + min(_MAX_SEGMENTS, _MAX_SENDMSG_BYTES // size))
        while end < limit and len(datagrams[end - 1][0]) == size:
            following, other = datagrams[end]
            if len(following) > size or other != peer_address:
                break
            end += 1
        peer_address.socket.send([data for data, _ in datagrams[start:end]], peer_address)
        start = end


async def open_udp_sockets(binds: Sequence[str]) -> list[UdpSocket]:
    """Open a socket for each address of each of `binds`. If one fails, close all and raise `ConfigError`."""
    sockets: list[socket.socket] = []
    try:
        for bind in binds:
            host, port = split_address(bind)
            try:
                found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=trio.socket.AI_PASSIVE)
                for family, kind, protocol, _, address in found:
                    sock = socket.socket(family, kind, protocol)
                    sockets.append(sock)
                    prepare_udp_socket(sock)
                    sock.bind(address)
            except OSError as error:
                raise ConfigError(f"cannot listen on UDP {bind}: {error.strerror or error}") from error
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return [UdpSocket(sock) for sock in sockets]


def prepare_udp_socket(sock: socket.socket) -> None:
    """Set the options of a UDP socket that is not bound yet."""
    sock.setblocking(False)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_SIZE)
