"""Appending to the log: publishes are batched and committed through one connection."""
