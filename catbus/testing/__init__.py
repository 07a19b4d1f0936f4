"""Tools for testing applications of Catbus: brokers for a test, Hypothesis strategies, and a model of the protocol.

| module                  | what it defines                                                                    |
|-------------------------|------------------------------------------------------------------------------------|
| `broker_in_thread`      | `open_test_server`: a broker with real sockets in a thread, for any event loop     |
| `broker_without_sockets`| `open_test_broker`: a broker in the test's Trio nursery, for the virtual clock     |
| `pytest`                | both as pytest fixtures: `pytest_plugins = ["catbus.testing.pytest"]`              |
| `strategies`            | Hypothesis strategies for channels, grants, tokens, messages and hostile input     |
| `reference_model`       | `ReferenceModel`: what each subscription has to receive                            |
| `broker_state_machine`  | `BrokerMachine`: drives a broker and compares it with the model                    |
| `machine_state`         | the settings of that state machine, and what its rules share                       |
| `event_stream_rules`    | its rules about event streams                                                      |
| `first_version_rules`   | its rules about clients of the first version of the protocol                       |
| `protocol_client`       | its client over WebSocket or WebTransport                                          |
| `event_stream`          | `EventStream`: a blocking client of `GET /events`                                  |
| `first_version_client`  | a client of the first version of the protocol                                      |
| `administration`        | requests of an administrator                                                       |
| `hostile_client`        | a client that sends invalid input, and what the broker may reply                   |
| `blocking_connection`   | `dial`: a connection for code that is not a coroutine                              |
| `fuzz`                  | what `catbus fuzz` runs                                                            |
| `shrinking`             | makes a failing example smaller                                                    |

Needs the extra `testing` (Hypothesis).
"""

try:
    import hypothesis as hypothesis
except ModuleNotFoundError as error:
    if error.name != "hypothesis":
        raise
    raise ModuleNotFoundError(
        "catbus.testing needs Hypothesis: pip install 'catbus-broker[testing]'", name=error.name
    ) from None

from .blocking_connection import BlockingConnection, ThreadedConnection, dial
from .broker_in_thread import TestServer, open_test_server
from .broker_state_machine import BrokerMachine
from .broker_without_sockets import TestBroker, open_test_broker
from .event_stream import EventBlock, EventStream
from .reference_model import ReferenceModel
from .strategies import (
    byte_streams,
    channels,
    client_messages,
    cut,
    grants,
    hostile_streams,
    malformed_messages,
    patterns,
    payloads,
    server_messages,
    tokens,
)

__all__ = [
    "BlockingConnection",
    "BrokerMachine",
    "EventBlock",
    "EventStream",
    "ReferenceModel",
    "TestBroker",
    "TestServer",
    "ThreadedConnection",
    "byte_streams",
    "channels",
    "client_messages",
    "cut",
    "dial",
    "grants",
    "hostile_streams",
    "malformed_messages",
    "open_test_broker",
    "open_test_server",
    "patterns",
    "payloads",
    "server_messages",
    "tokens",
]
