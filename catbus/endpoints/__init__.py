"""Where clients come in: the WebSocket port, with the HTTP that is served on it."""

from .listen import Endpoint, EndpointStatistics, serve_http

__all__ = ["Endpoint", "EndpointStatistics", "serve_http"]
