"""Presence in PostgreSQL: a table of memberships that all replicas write and read."""
