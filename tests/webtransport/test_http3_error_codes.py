"""catbus.webtransport.http3_error_codes, varint"""

from __future__ import annotations

import pytest
from aioquic.buffer import encode_uint_var
from aioquic.quic.packet import Buffer  # type: ignore[attr-defined]
from hypothesis import given
from hypothesis import strategies as st

from catbus.webtransport import varint
from catbus.webtransport.http3_error_codes import Http3ErrorCode, from_http3_error_code, to_http3_error_code


@given(st.integers(0, 0xFFFFFFFF))
def test_application_code_survives_the_mapping(code: int) -> None:
    carried = to_http3_error_code(code)
    assert from_http3_error_code(carried) == code
    assert (carried - 0x21) % 0x1F, "a reserved value"


def test_codes_match_the_values_of_the_draft() -> None:
    assert to_http3_error_code(0) == 0x52E4A40FA8DB
    assert to_http3_error_code(0xFFFFFFFF) == 0x52E5AC983162
    assert to_http3_error_code(0x1D) + 2 == to_http3_error_code(0x1E)


@pytest.mark.parametrize("code", [*Http3ErrorCode, 0, 0x52E4A40FA8DA, 0x52E5AC983163, 0x52E4A40FA8F9, 2**62 - 1])
def test_other_codes_map_to_none(code: int) -> None:
    assert from_http3_error_code(code) is None


@pytest.mark.parametrize("code", [-1, 2**32])
def test_application_code_has_32_bits(code: int) -> None:
    with pytest.raises(ValueError, match="32 bits"):
        to_http3_error_code(code)


@given(st.integers(0, varint.MAX), st.binary(max_size=3), st.binary(max_size=3))
def test_integers_are_encoded_as_by_aioquic(value: int, before: bytes, after: bytes) -> None:
    written = varint.encode(value)
    assert written == encode_uint_var(value)
    assert varint.decode(before + written + after, len(before)) == (value, len(before) + len(written))
    for cut in range(len(written)):
        assert varint.decode(written[:cut]) is None


@given(st.binary(min_size=8, max_size=8))
def test_integers_are_decoded_from_any_length(data: bytes) -> None:
    buffer = Buffer(data=data)
    assert varint.decode(data) == (buffer.pull_uint_var(), buffer.tell())


def test_too_large_integer_is_rejected() -> None:
    with pytest.raises(ValueError, match="too large"):
        varint.encode(varint.MAX + 1)
