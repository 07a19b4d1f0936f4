"""What one client or one address may use: CPU time, memory, connections, and messages per second."""
