"""Webhooks in PostgreSQL: the leases of partitions, and the task of a replica that delivers."""
