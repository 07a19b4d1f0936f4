"""The keys of a log: signatures, encryption, and the same functions in SQL."""

from __future__ import annotations

import hmac
from base64 import b64decode
from hashlib import sha256

import asyncpg  # type: ignore[import-untyped]
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from catbus.postgres.notifications.encryption import (
    EPHEMERAL_CHANNEL,
    LOG_CHANNEL,
    ROLES_CHANNEL,
    ForgedNotificationError,
    NotificationEncrypter,
    NotificationKeys,
    random_keys,
)
from tests.postgres.sql import open_sql

SEAL = NotificationKeys("known to the owner of the log")

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=" \0"), min_size=1, max_size=20)
channels = st.sampled_from([LOG_CHANNEL, EPHEMERAL_CHANNEL, ROLES_CHANNEL])


@given(channels, words, words | st.just(""))
def test_signed_notification_is_verified_on_its_channel(channel: str, shown: str, enclosed: str) -> None:
    payload = SEAL.sign(channel, shown, enclosed)
    assert SEAL.verify(channel, payload) == (shown, enclosed)
    for other in {LOG_CHANNEL, EPHEMERAL_CHANNEL, ROLES_CHANNEL} - {channel}:
        with pytest.raises(ForgedNotificationError):
            SEAL.verify(other, payload)
    with pytest.raises(ForgedNotificationError):
        random_keys().verify(channel, payload)


@given(st.data())
def test_notification_changed_anywhere_is_forged(data: st.DataObject) -> None:
    payload = SEAL.sign(LOG_CHANNEL, "e:1:1", "1763912345678 QUJDRA==")
    place = data.draw(st.integers(0, len(payload) - 1))
    other = data.draw(st.characters(exclude_categories=["Cs"], exclude_characters=payload[place]))
    length = data.draw(st.integers(0, len(payload) - 1))
    for forged in (
        payload[:place] + other + payload[place + 1 :],
        payload[:place] + payload[place + 1 :],
        payload[:length],
    ):
        with pytest.raises(ForgedNotificationError):
            SEAL.verify(LOG_CHANNEL, forged)


@given(st.text())
def test_unsigned_text_is_forged(text: str) -> None:
    for forged in (text, f"e:1:1 {text}", f"e:1:1 {'A' * 43}= {text}"):
        with pytest.raises(ForgedNotificationError):
            SEAL.verify(LOG_CHANNEL, forged)
        with pytest.raises(ForgedNotificationError):
            SEAL.decrypt(LOG_CHANNEL, forged)


@given(st.binary(max_size=100), words)
def test_encrypted_text_is_decrypted_only_with_its_context(text: bytes, bound: str) -> None:
    sealer = NotificationEncrypter(LOG_CHANNEL)
    one, other = sealer.encrypt(SEAL, text, bound), sealer.encrypt(SEAL, text, bound)
    assert SEAL.decrypt(LOG_CHANNEL, one, bound) == SEAL.decrypt(LOG_CHANNEL, other, bound) == text
    assert b64decode(one)[:16] == b64decode(other)[:16] == sealer.incarnation
    assert b64decode(one)[16:24] != b64decode(other)[16:24], "no nonce is used twice"
    for seal, channel, where in (
        (SEAL, EPHEMERAL_CHANNEL, bound),
        (SEAL, LOG_CHANNEL, bound + "."),
        (random_keys(), LOG_CHANNEL, bound),
    ):
        with pytest.raises(ForgedNotificationError):
            seal.decrypt(channel, one, where)


def test_each_replica_encrypts_with_its_own_key() -> None:
    one, other = NotificationEncrypter(LOG_CHANNEL), NotificationEncrypter(LOG_CHANNEL)
    raw = b64decode(one.encrypt(SEAL, b"text"))
    key = HKDF(SHA256(), 32, raw[:16], LOG_CHANNEL.encode()).derive(b"known to the owner of the log")
    assert AESGCM(key).decrypt(bytes(11) + b"\x01", raw[24:], b"") == b"text"
    assert one.incarnation != other.incarnation


async def test_sql_hmac_follows_its_definition(database_url: str) -> None:
    lengths = [0, 1, 55, 56, 63, 64, 65, 1000]
    async with open_sql(database_url) as sql:
        for length in lengths:
            key, message = sha256(b"%d" % length).digest(), bytes(index % 256 for index in range(length))
            ((made,),) = await sql.fetch("SELECT catbus.hmac($1, $2)", key, message)
            assert made == hmac.digest(key, message, "sha256")
        for key in (b"\xff" * 32, bytes(32)):
            ((made,),) = await sql.fetch("SELECT catbus.hmac($1, '')", key)
            assert made == hmac.digest(key, b"", "sha256")


async def test_sql_masks_a_role_key_differently_each_time(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        ((secret,),) = await sql.fetch("SELECT notification_secret FROM catbus.head")
        for key in (sha256(b"a role").digest(), bytes(32), b"\xff" * 32):
            (one,), (other,) = await sql.fetch("SELECT catbus.mask_role($1) FROM generate_series(1, 2)", key)
            assert NotificationKeys(secret).unmask_role(one) == NotificationKeys(secret).unmask_role(other) == key
            assert one[:32] != other[:32]
            assert one[32:] != other[32:]
            assert random_keys().unmask_role(one) != key


def test_asyncpg_still_calls_the_overridden_method_for_notifications() -> None:
    assert "_process_notification" in vars(asyncpg.Connection)
