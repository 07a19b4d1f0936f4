"""The ports that clients connect to: one for HTTP and WebSocket over TCP, and one for WebTransport over UDP."""

from .http.http_endpoint import HttpEndpoint, HttpEndpointStatistics, serve_http
from .webtransport.quic_endpoint import QuicEndpoint, QuicEndpointStatistics, serve_quic

__all__ = [
    "HttpEndpoint",
    "HttpEndpointStatistics",
    "QuicEndpoint",
    "QuicEndpointStatistics",
    "serve_http",
    "serve_quic",
]
