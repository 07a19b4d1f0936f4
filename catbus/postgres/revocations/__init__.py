"""Revocations in the database: how they are stored, and how replicas follow them."""
