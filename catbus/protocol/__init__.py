"""The protocol `catbus.v1` without I/O, shared by broker and client: messages, channels and patterns."""
