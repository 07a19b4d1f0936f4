"""For tests of what is built on Catbus: strategies for everything that the protocol knows, and brokers for a test.

Needs the extra `testing` (Hypothesis). With `pytest_plugins = ["catbus.testing.pytest"]` in a `conftest.py` there is a
broker as a fixture.
"""

try:
    import hypothesis as hypothesis
except ModuleNotFoundError as error:
    if error.name != "hypothesis":
        raise
    raise ModuleNotFoundError(
        "catbus.testing needs Hypothesis: pip install 'catbus-broker[testing]'", name=error.name
    ) from None

from .brokers import TestBroker, open_test_broker
from .connections import Connection, Dialled, dial
from .machine import BrokerMachine
from .model import Model
from .servers import TestServer, open_test_server
from .strategies import (
    byte_streams,
    channels,
    client_messages,
    cut,
    grants,
    hostile_streams,
    nearly_messages,
    patterns,
    payloads,
    server_messages,
    tokens,
)

__all__ = [
    "BrokerMachine",
    "Connection",
    "Dialled",
    "Model",
    "TestBroker",
    "TestServer",
    "byte_streams",
    "channels",
    "client_messages",
    "cut",
    "dial",
    "grants",
    "hostile_streams",
    "nearly_messages",
    "open_test_broker",
    "open_test_server",
    "patterns",
    "payloads",
    "server_messages",
    "tokens",
]
