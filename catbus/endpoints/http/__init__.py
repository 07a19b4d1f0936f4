"""HTTP/1.1: the listener sockets, the connections, and the routes."""
