"""The protocol `catbus.v1` without I/O, shared by the broker and the clients: messages, channels, patterns."""
