"""Consumers: named positions in the log, which SQL transactions move."""
