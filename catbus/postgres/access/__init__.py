"""Access to PostgreSQL: connections, their URLs and settings, reconnection, schema migrations and checks."""
