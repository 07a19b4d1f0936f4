"""WebTransport: the UDP sockets, the datagrams on their way to QUIC connections, and one session."""
