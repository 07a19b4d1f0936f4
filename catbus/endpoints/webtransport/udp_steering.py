"""The choice of the worker for each UDP datagram, which the kernel makes by the QUIC connection ID."""

from __future__ import annotations

import array
import socket
import struct

_SO_ATTACH_REUSEPORT_CBPF = 51

# Classic BPF: bpf(4) of FreeBSD has the instructions, linux/filter.h the numbers.
_LOAD_BYTE, _JUMP, _JUMP_IF_SET, _MODULO, _RETURN = 0x30, 0x05, 0x45, 0x94, 0x16


def steer_datagrams(sock: socket.socket, count: int) -> None:
    """Let the kernel choose among the `count` sockets with the address of `sock`, all of which have SO_REUSEPORT.

    The number of the socket, in the order of binding, is the first byte of the connection ID modulo `count`: byte 6 of
    a packet with a long header and byte 1 of one with a short header (RFC 8999 section 5). A packet that is too short
    is for socket 0. No socket may be closed while others are used: the last one would take its number. Raises `OSError`
    where the kernel cannot do this; it needs no privilege.
    """
    program = (
        (_LOAD_BYTE, 0, 0, 0),
        (_JUMP_IF_SET, 2, 0, 0x80),
        (_LOAD_BYTE, 0, 0, 1),
        (_JUMP, 0, 0, 1),
        (_LOAD_BYTE, 0, 0, 6),
        (_MODULO, 0, 0, count),
        (_RETURN, 0, 0, 0),
    )
    code = array.array("B", b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    address, _ = code.buffer_info()
    # struct sock_fprog: the number of instructions, and a pointer to them.
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, struct.pack("@HP", len(program), address))


def can_steer_datagrams() -> bool:
    """Whether the kernel of this machine can choose by the connection ID."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            steer_datagrams(sock, 2)
    except (OSError, AttributeError):
        return False
    return True
