"""catbus.webtransport.quic_configuration"""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from catbus.errors import ConfigError
from catbus.webtransport import client_configuration, server_configuration
from tests.webtransport.simulated_link import Link, certificate, client_config


def other_key() -> str:
    return (
        ec.generate_private_key(ec.SECP256R1())
        .private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        .decode()
    )


def test_certificate_may_be_text_bytes_or_a_file(tmp_path: Path) -> None:
    pem, key, _ = certificate()
    (tmp_path / "cert.pem").write_text(pem)
    (tmp_path / "key.pem").write_text(key)
    for one in (
        server_configuration(pem, key),
        server_configuration(pem.encode(), key.encode()),
        server_configuration(tmp_path / "cert.pem", tmp_path / "key.pem"),
    ):
        assert one.quic.certificate is not None
        assert one.quic.private_key is not None


def test_chain_follows_the_certificate() -> None:
    pem, key, _ = certificate()
    assert len(server_configuration(pem + pem, key).quic.certificate_chain) == 1


@pytest.mark.parametrize("pem", ["", "nothing", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_unreadable_certificates_are_errors(pem: str) -> None:
    with pytest.raises(ConfigError, match="the certificate cannot be read"):
        server_configuration(pem, certificate()[1])
    with pytest.raises(ConfigError, match="the private key cannot be read"):
        server_configuration(certificate()[0], pem)
    with pytest.raises(ConfigError, match="the CA certificate cannot be read"):
        client_configuration("localhost", ca=pem)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.pem"):
        server_configuration(tmp_path / "none.pem", certificate()[1])


def test_key_of_another_certificate_is_an_error() -> None:
    with pytest.raises(ConfigError, match="does not match the certificate"):
        server_configuration(certificate()[0], other_key())


def test_matching_hash_is_sufficient_for_any_name() -> None:
    Link(client=client_configuration("elsewhere.example", certificate_hash=certificate()[2])).open()


def test_mismatched_hash_is_refused_before_data_is_sent() -> None:
    link = Link(client=client_configuration("localhost", certificate_hash=bytes(32)))
    link.until(lambda: link.client.lost)
    link.run(1)
    assert link.client.lost == "the server's certificate does not have the expected hash"
    assert not [event for event in link.server.events if type(event).__name__ == "SessionRequested"]


def test_hash_must_have_32_bytes() -> None:
    with pytest.raises(ConfigError, match="32 bytes"):
        client_configuration("localhost", certificate_hash=b"short")


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_self_signed_certificate_is_its_own_ca(name: str) -> None:
    Link(client=client_configuration(name, ca=certificate()[0])).open()


def test_other_host_name_is_refused() -> None:
    link = Link(client=client_configuration("elsewhere.example", ca=certificate()[0]))
    link.until(lambda: link.client.lost)
    assert not link.server.it.session_open


def test_unknown_ca_is_refused() -> None:
    link = Link(client=client_configuration("localhost"))
    link.until(lambda: link.client.lost)


def test_client_allows_a_server_100_streams() -> None:
    link = Link().open()
    assert link.server.it.stream_credit(bidirectional=False) == 100
    assert link.client.it.stream_credit(bidirectional=False) == 13


def test_one_configuration_serves_many_connections() -> None:
    assert client_config() is client_config()
    for _ in range(2):
        Link().open()
