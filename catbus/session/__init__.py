"""One connected client: a pure state machine, and the driver that carries out its effects."""
