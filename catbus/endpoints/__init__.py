"""Where clients come in: the WebSocket port, with the HTTP that is served on it, and the WebTransport port."""

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
