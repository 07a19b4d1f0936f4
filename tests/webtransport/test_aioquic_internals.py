"""Private parts of aioquic that Catbus uses. If a test fails, aioquic has changed and the code needs a review."""

from __future__ import annotations

import inspect

import pytest
from aioquic.h3.connection import H3Connection
from aioquic.quic import connection as module
from aioquic.quic.connection import Limit, QuicConnection, QuicConnectionId
from aioquic.quic.stream import QuicStream, QuicStreamSender

from catbus.webtransport.http3_connection import Http3Connection
from catbus.webtransport.quic_connection import BoundedQuicConnection
from tests.webtransport.simulated_link import Link

QUIC = [
    "_QuicConnection__frame_handlers",
    "_close_event",
    "_close_pending",
    "_crypto_streams",
    "_datagrams_pending",
    "_handshake_complete",
    "_handshake_confirmed",
    "_handshake_done_pending",
    "_host_cids",
    "_is_client",
    "_local_max_data",
    "_local_max_streams_bidi",
    "_local_max_streams_uni",
    "_logger",
    "_network_paths",
    "_pacing_at",
    "_peer_cid",
    "_peer_cid_available",
    "_ping_pending",
    "_probe_pending",
    "_remote_max_datagram_frame_size",
    "_remote_max_streams_bidi",
    "_remote_max_streams_uni",
    "_remote_preferred_address",
    "_retire_connection_ids",
    "_retry_source_connection_id",
    "_spaces",
    "_streams",
    "_streams_blocked_pending",
    "_streams_queue",
    "tls",
]


@pytest.fixture(scope="module")
def link() -> Link:
    return Link().open()


@pytest.mark.parametrize("name", QUIC)
def test_connection_has_every_attribute_that_catbus_reads(link: Link, name: str) -> None:
    assert hasattr(link.client.it._quic, name)
    assert hasattr(link.server.it._quic, name)
    assert name not in vars(BoundedQuicConnection), "ours hides that it is gone"


def test_stream_has_every_attribute_that_catbus_reads(link: Link) -> None:
    stream = QuicStream(stream_id=0, max_stream_data_local=1, max_stream_data_remote=1)
    assert {"_buffer", "_buffer_start", "_buffer_stop", "_pending", "highest_offset"} <= vars(stream.sender).keys()
    assert {"buffer_is_empty", "is_finished", "reset_pending"} <= vars(stream.sender).keys()
    assert {"_ranges", "highest_offset", "is_finished", "stop_pending"} <= vars(stream.receiver).keys()
    assert {"max_stream_data_local", "max_stream_data_local_sent"} <= vars(stream).keys()
    assert {"value", "sent", "used", "frame_type"} <= vars(Limit(0, "", 0)).keys()
    assert {"cid", "stateless_reset_token", "was_sent"} <= QuicConnectionId.__dataclass_fields__.keys()
    assert hasattr(link.client.it._quic.tls, "_peer_certificate")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("close", ["self", "error_code", "frame_type", "reason_phrase"]),
        ("datagrams_to_send", ["self", "now"]),
        ("_write_connection_limits", ["self", "builder", "space"]),
        ("_write_stream_limits", ["self", "builder", "space", "stream"]),
        ("_get_or_create_stream", ["self", "frame_type", "stream_id"]),
        ("_handle_crypto_frame", ["self", "context", "frame_type", "buf"]),
        ("_handle_reset_stream_frame", ["self", "context", "frame_type", "buf"]),
        ("_assert_stream_can_receive", ["self", "frame_type", "stream_id"]),
        ("_serialize_transport_parameters", ["self"]),
        ("_parse_transport_parameters", ["self", "data", "from_session_ticket"]),
        ("_write_reset_stream_frame", ["self", "builder", "stream"]),
        ("_replenish_connection_ids", ["self"]),
        ("_on_connection_limit_delivery", ["self", "delivery", "limit"]),
        ("_on_max_stream_data_delivery", ["self", "delivery", "stream"]),
    ],
)
def test_overridden_connection_methods_keep_their_parameters(name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(QuicConnection, name)).parameters) == parameters


@pytest.mark.parametrize(
    "name",
    [
        "_write_connection_limits",
        "_write_stream_limits",
        "_write_reset_stream_frame",
        "_get_or_create_stream",
        "_replenish_connection_ids",
        "_serialize_transport_parameters",
        "_parse_transport_parameters",
    ],
)
def test_overridden_connection_methods_are_called_by_aioquic(name: str) -> None:
    assert f"self.{name}(" in inspect.getsource(QuicConnection)


def test_flow_control_frames_have_enough_capacity() -> None:
    assert module.CONNECTION_LIMIT_FRAME_CAPACITY >= 9
    assert module.MAX_STREAM_DATA_FRAME_CAPACITY >= 17


def test_http3_has_every_method_and_attribute_that_catbus_uses(link: Link) -> None:
    assert list(inspect.signature(H3Connection._get_local_settings).parameters) == ["self"]
    assert list(inspect.signature(H3Connection._init_connection).parameters) == ["self"]
    http3 = link.server.it._connect_stream.http3
    assert isinstance(http3, Http3Connection)
    names = {"_decoder", "_stream", "_max_push_id", "_max_table_capacity", "_blocked_streams"}
    assert names <= vars(http3).keys()
    assert hasattr(http3._stream[0], "buffer")


def test_reset_stream_sends_nothing_of_its_buffer() -> None:
    sender = QuicStreamSender(stream_id=0, writable=True)
    sender.write(b"abc")
    sender.reset(1)
    assert sender.buffer_is_empty
    with pytest.raises(AssertionError):
        sender.get_frame(100)
