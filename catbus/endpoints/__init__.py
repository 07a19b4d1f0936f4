"""Where clients come in: the WebSocket port, with the HTTP that is served on it, and the WebTransport port."""

from .listen import Endpoint, EndpointStatistics, serve_http
from .quic import QuicEndpoint, QuicStatistics, serve_quic

__all__ = ["Endpoint", "EndpointStatistics", "QuicEndpoint", "QuicStatistics", "serve_http", "serve_quic"]
