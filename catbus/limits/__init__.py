"""Limits of clients and addresses: CPU time, memory, connections and messages per second."""
