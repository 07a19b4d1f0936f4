"""The commands, a module each: `catbus run` is `run`."""
