"""The commands, one module each. `catbus run` is in `run`."""
