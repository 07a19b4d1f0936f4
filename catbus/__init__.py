"""A real-time message broker on Trio: WebTransport and WebSocket clients, one durable log in PostgreSQL."""
