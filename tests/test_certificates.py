"""catbus.certificates"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import logging
import os
import resource
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from catbus import certificates
from catbus.certificates import DEVELOPMENT_FILE, Certificate, CertificateSource, development_certificate
from catbus.config import WebTransportSettings
from catbus.endpoints.http.discovery_document import discovery_document
from catbus.errors import ConfigError
from catbus.webtransport import ConnectionLimits, WebTransportConfiguration, client_configuration, server_configuration
from tests.webtransport.simulated_link import Link

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
SECOND = timedelta(seconds=1)


def parse(certificate: Certificate) -> x509.Certificate:
    return x509.load_pem_x509_certificate(certificate.certificate_pem.encode())


def shown(configuration: WebTransportConfiguration) -> str:
    """The PEM of the certificate that a server with this configuration shows."""
    certificate = configuration.quic.certificate
    assert certificate is not None
    return ssl.DER_cert_to_PEM_cert(certificate.public_bytes(Encoding.DER))


def make(directory: Path) -> Certificate:
    return development_certificate(directory, NOW)


# The development certificate.


def test_it_is_what_browsers_take_by_its_hash(tmp_path: Path) -> None:
    certificate = parse(make(tmp_path))
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)
    period = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert 10 * DAY <= period <= 13 * DAY
    assert timedelta(0) <= NOW - certificate.not_valid_before_utc - timedelta(hours=1) < SECOND


def test_it_is_a_server_certificate_for_this_machine_and_no_authority(tmp_path: Path) -> None:
    extensions = parse(make(tmp_path)).extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address("127.0.0.1"), ip_address("::1")]
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.digital_signature, usage.key_cert_sign, usage.crl_sign) == (True, False, False)
    assert ExtendedKeyUsageOID.SERVER_AUTH in extensions.get_extension_for_class(x509.ExtendedKeyUsage).value


def test_hash_and_end_are_those_of_the_certificate(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert made.sha256 == hashlib.sha256(ssl.PEM_cert_to_DER_cert(made.certificate_pem)).digest()
    assert made.expires == parse(made).not_valid_after_utc


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1"])
def test_a_client_that_has_it_as_ca_connects(tmp_path: Path, name: str) -> None:
    made = make(tmp_path)
    server = server_configuration(made.certificate_pem, made.key_pem)
    Link(server=server, client=client_configuration(name, ca=made.certificate_pem)).open()


def test_a_client_that_has_its_hash_connects(tmp_path: Path) -> None:
    made = make(tmp_path)
    server = server_configuration(made.certificate_pem, made.key_pem)
    Link(server=server, client=client_configuration("localhost", certificate_hash=made.sha256)).open()


def test_it_is_good_for_the_strictest_of_openssl(tmp_path: Path) -> None:
    context = ssl.create_default_context(cadata=make(tmp_path).certificate_pem)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    (tmp_path / "server.pem").write_text((tmp_path / DEVELOPMENT_FILE).read_text())
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "server.pem")
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        context.wrap_bio(back, there, server_hostname="localhost"),
        server.wrap_bio(there, back, server_side=True),
    ]
    done = set()
    for _ in range(5):
        for end in ends:
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                pass
    assert len(done) == 2


def test_it_is_kept(tmp_path: Path) -> None:
    directory = tmp_path / "not" / "there" / "yet"
    made = make(directory)
    assert development_certificate(directory, NOW + 9 * DAY) == made
    assert (directory / DEVELOPMENT_FILE).stat().st_mode & 0o777 == 0o600


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    make(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([DEVELOPMENT_FILE, f".{DEVELOPMENT_FILE}.lock"])


def test_one_that_is_good_needs_no_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(certificates, "_locked", refuse)
    assert make(tmp_path) == made


@contextmanager
def no_file_left() -> Iterator[None]:
    """Let this process open no file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_one_that_cannot_be_read_for_want_of_files_is_not_made_anew(tmp_path: Path) -> None:
    made = make(tmp_path)
    with no_file_left(), pytest.raises(ConfigError, match="Too many open files"):
        make(tmp_path)
    assert make(tmp_path) == made


def test_it_is_made_anew_with_less_than_two_days_left(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert development_certificate(tmp_path, made.expires - 2 * DAY) == made
    renewed = development_certificate(tmp_path, made.expires - 2 * DAY + SECOND)
    assert renewed.sha256 != made.sha256
    assert renewed.expires > made.expires + 9 * DAY


def test_it_is_made_anew_when_it_is_not_valid_yet(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert development_certificate(tmp_path, NOW - DAY).expires < made.expires


def swap_key(text: str, other: str) -> str:
    return other.partition("-----BEGIN CERTIFICATE")[0] + text[text.index("-----BEGIN CERTIFICATE") :]


DAMAGE: dict[str, Any] = {
    "empty": lambda text, other: "",
    "half of it": lambda text, other: text[: len(text) // 2],
    "no certificate": lambda text, other: text[: text.index("-----BEGIN CERTIFICATE")],
    "no key": lambda text, other: text[text.index("-----BEGIN CERTIFICATE") :],
    "another key": swap_key,
    "not ASCII": lambda text, other: text.replace("M", "é"),
    "nonsense": lambda text, other: "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n" * 2,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_it_is_made_anew_when_it_is_damaged(tmp_path: Path, damage: str) -> None:
    made = make(tmp_path)
    make(tmp_path / "other")
    damaged = DAMAGE[damage](
        (tmp_path / DEVELOPMENT_FILE).read_text(), (tmp_path / "other" / DEVELOPMENT_FILE).read_text()
    )
    (tmp_path / DEVELOPMENT_FILE).write_text(damaged)
    again = make(tmp_path)
    assert again.sha256 != made.sha256
    assert make(tmp_path) == again
    server_configuration(again.certificate_pem, again.key_pem)


def test_one_that_no_browser_would_take_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(certificates, "LIFETIME", 15 * DAY)
        long = development_certificate(tmp_path, NOW - 5 * DAY)
    assert make(tmp_path).sha256 != long.sha256


def test_one_that_is_an_authority_is_made_anew(tmp_path: Path) -> None:
    """rustls refuses such a certificate as that of a server."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "catbus development")])
    authority = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, NOW - DAY, NOW - DAY + certificates.LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / DEVELOPMENT_FILE).write_bytes(private + authority.public_bytes(Encoding.PEM))
    assert not parse(make(tmp_path)).extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o777])
def test_wrong_permissions_are_repaired(tmp_path: Path, mode: int) -> None:
    made = make(tmp_path)
    (tmp_path / DEVELOPMENT_FILE).chmod(mode)
    assert make(tmp_path) == made
    assert (tmp_path / DEVELOPMENT_FILE).stat().st_mode & 0o777 == 0o600


def test_the_key_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / DEVELOPMENT_FILE).stat().st_mode & 0o777 == 0o600


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"CATBUS_STATE.*CATBUS_CERT and CATBUS_KEY"):
        make(tmp_path / "file")
    (tmp_path / DEVELOPMENT_FILE).mkdir()
    with pytest.raises(ConfigError, match="Is a directory"):
        make(tmp_path)


def test_threads_that_ask_together_get_the_same(tmp_path: Path) -> None:
    together = threading.Barrier(8)

    def start(_: int) -> Certificate:
        together.wait()
        return make(tmp_path)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(start, range(8)))) == 1


def test_processes_that_start_together_get_the_same(tmp_path: Path) -> None:
    program = (
        "import sys, datetime, pathlib; from catbus.certificates import development_certificate as make\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(make(pathlib.Path(sys.argv[1]), datetime.datetime.now(datetime.UTC)).sha256.hex())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    root = str(Path(__file__).parent.parent)
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(3)
    ]
    hashes = set()
    try:
        for one in started:
            assert one.stdout is not None
            assert one.stdout.readline() == "ready\n"
        for one in started:
            assert one.stdin is not None
            one.stdin.write("\n")
            one.stdin.flush()
        for one in started:
            hashes.add(one.communicate(timeout=30)[0].strip())
    finally:
        for one in started:
            one.kill()
            one.communicate()
    assert hashes == {make(tmp_path).sha256.hex()}


def test_nothing_shows_the_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    made = make(tmp_path)
    source = CertificateSource(WebTransportSettings(), tmp_path, NOW)
    renewed = source.development(NOW + 11 * DAY)
    assert renewed is not None
    assert caplog.records
    text = "".join(str(vars(record)) for record in caplog.records) + repr((made, renewed, source)) + str(made)
    for certificate in (made, renewed):
        assert not [line for line in certificate.key_pem.splitlines() if line in text]


# A source of configurations.


class Files:
    """A certificate and its key, as cert-manager puts them into a volume: behind a link that is swapped."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cert, self.key = directory / "tls.crt", directory / "tls.key"
        self.cert.symlink_to("data/tls.crt")
        self.key.symlink_to("data/tls.key")
        self.settings = WebTransportSettings(cert=str(self.cert), key=str(self.key))
        self._count = 0

    def swap(self, certificate: str, key: str) -> None:
        self._count += 1
        target = self.directory / f"version-{self._count}"
        target.mkdir()
        (target / "tls.crt").write_text(certificate)
        (target / "tls.key").write_text(key)
        (self.directory / "new").symlink_to(target.name)
        (self.directory / "new").replace(self.directory / "data")

    def source(self) -> CertificateSource:
        return CertificateSource(self.settings, self.directory / "unused", NOW)


@pytest.fixture
def one(tmp_path: Path) -> Certificate:
    return make(tmp_path / "one")


@pytest.fixture
def two(tmp_path: Path) -> Certificate:
    return make(tmp_path / "two")


@pytest.fixture
def files(tmp_path: Path, one: Certificate) -> Files:
    files = Files(tmp_path)
    files.swap(one.certificate_pem, one.key_pem)
    return files


def test_what_files_hold_is_used(files: Files, one: Certificate) -> None:
    source = files.source()
    assert shown(source.current(NOW)) == one.certificate_pem
    assert source.development(NOW) is None
    assert not (files.directory / "unused").exists()


def test_a_chain_is_shown_with_it(files: Files, one: Certificate, two: Certificate) -> None:
    files.swap(one.certificate_pem + two.certificate_pem, one.key_pem)
    assert len(files.source().current(NOW).quic.certificate_chain) == 1


def test_limits_are_passed_on(files: Files) -> None:
    limits = ConnectionLimits(queued_datagrams=7)
    assert CertificateSource(files.settings, files.directory, NOW, limits).current(NOW).limits == limits
    assert CertificateSource(WebTransportSettings(), files.directory, NOW, limits).current(NOW).limits == limits


def test_a_swapped_link_is_noticed(files: Files, two: Certificate) -> None:
    source = files.source()
    files.swap(two.certificate_pem, two.key_pem)
    assert shown(source.current(NOW + SECOND)) == two.certificate_pem


def test_a_change_for_which_no_file_is_left_is_taken_later(
    files: Files, one: Certificate, two: Certificate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = files.source()
    files.swap(two.certificate_pem, two.key_pem)
    with no_file_left():
        assert shown(source.current(NOW + SECOND)) == one.certificate_pem

    def no_memory(name: str) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        # The last file is taken between reading the two and loading them.
        patched.setattr(os, "memfd_create", no_memory)
        assert shown(source.current(NOW + 2 * SECOND)) == one.certificate_pem
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert all("Too many open files" in vars(record)["reason"] for record in caplog.records)
    assert shown(source.current(NOW + 3 * SECOND)) == two.certificate_pem


def test_files_written_over_are_noticed(files: Files, two: Certificate) -> None:
    source = files.source()
    files.cert.write_text(two.certificate_pem)
    files.key.write_text(two.key_pem)
    assert shown(source.current(NOW + SECOND)) == two.certificate_pem


def test_a_change_while_the_files_are_read_is_noticed(
    files: Files, one: Certificate, two: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_and_swap(certificate: bytes, key: bytes, limits: ConnectionLimits | None) -> WebTransportConfiguration:
        files.swap(two.certificate_pem, two.key_pem)
        return server_configuration(certificate, key, limits)

    with monkeypatch.context() as patch:
        patch.setattr(certificates, "server_configuration", read_and_swap)
        source = files.source()
    assert shown(source.current(NOW)) == one.certificate_pem
    assert shown(source.current(NOW + SECOND)) == two.certificate_pem


def test_connections_made_after_a_swap_have_the_new_one(files: Files, one: Certificate, two: Certificate) -> None:
    source = files.source()
    Link(server=source.current(NOW), client=client_configuration("localhost", ca=one.certificate_pem)).open()
    files.swap(two.certificate_pem, two.key_pem)
    now = NOW + SECOND
    Link(server=source.current(now), client=client_configuration("localhost", ca=two.certificate_pem)).open()


def test_nothing_changed_is_the_same_object(files: Files) -> None:
    source = files.source()
    assert {id(source.current(NOW + number * SECOND)) for number in range(5)} == {id(source.current(NOW))}


def test_it_looks_once_a_second_at_the_most(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    source = files.source()
    looks: list[Path] = []
    stat = Path.stat

    def count(path: Path, **options: bool) -> os.stat_result:
        looks.append(path)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", count)
    for tenth in range(31):
        source.current(NOW + tenth * SECOND / 10)
    assert looks == [files.cert, files.key] * 3


def test_a_clock_set_back_does_not_stop_it(files: Files, two: Certificate) -> None:
    source = files.source()
    files.swap(two.certificate_pem, two.key_pem)
    assert shown(source.current(NOW - 5 * DAY)) == two.certificate_pem


@pytest.mark.parametrize("problem", ["mismatched", "half a certificate", "half a key", "gone", "swapped"])
def test_what_is_no_good_is_logged_once_and_the_old_one_stays(
    files: Files, one: Certificate, two: Certificate, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = files.source()
    match problem:
        case "mismatched":
            files.swap(two.certificate_pem, one.key_pem)
        case "half a certificate":
            files.swap(two.certificate_pem[:300], two.key_pem)
        case "half a key":
            files.swap(two.certificate_pem, two.key_pem[:100])
        case "gone":
            (files.directory / "data").unlink()
        case "swapped":
            files.swap(two.key_pem, two.certificate_pem)
    for seconds in range(1, 5):
        assert shown(source.current(NOW + seconds * SECOND)) == one.certificate_pem
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "CATBUS_" in vars(record)["reason"]
    assert not [line for line in (one.key_pem + two.key_pem).splitlines()[1:-1] if line in str(vars(record))]
    # And when it has been put right:
    files.swap(two.certificate_pem, two.key_pem)
    assert shown(source.current(NOW + 5 * SECOND)) == two.certificate_pem
    # The next problem is another one.
    (files.directory / "data").unlink()
    source.current(NOW + 6 * SECOND)
    assert [record.levelname for record in caplog.records].count("WARNING") == 2


def test_files_that_come_back_unchanged_may_be_missed_again(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    source = files.source()
    for seconds in (1, 3):
        (files.directory / "data").rename(files.directory / "away")
        source.current(NOW + seconds * SECOND)
        (files.directory / "away").rename(files.directory / "data")
        source.current(NOW + (seconds + 1) * SECOND)
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("lost", "setting"),
    [("cert", r"\[webtransport\] cert / CATBUS_CERT"), ("key", r"\[webtransport\] key / CATBUS_KEY")],
)
def test_files_that_are_missing_at_the_start(files: Files, lost: str, setting: str) -> None:
    path: Path = getattr(files, lost)
    path.unlink()
    with pytest.raises(ConfigError, match=f"{setting}: {path}: No such file"):
        files.source()


def test_files_that_do_not_belong_together_at_the_start(files: Files, one: Certificate, two: Certificate) -> None:
    files.swap(one.certificate_pem, two.key_pem)
    with pytest.raises(ConfigError, match=r"\[webtransport\] cert / CATBUS_CERT .*does not match") as caught:
        files.source()
    assert "\n" not in str(caught.value)


def test_the_development_certificate_is_renewed_before_it_expires(tmp_path: Path) -> None:
    source = CertificateSource(WebTransportSettings(), tmp_path, NOW)
    first, seen = source.development(NOW), set()
    assert first is not None
    now = NOW
    while now < NOW + 40 * DAY:
        made = source.development(now)
        assert made is not None
        assert shown(source.current(now)) == made.certificate_pem
        assert made.expires - now >= 2 * DAY
        assert parse(made).not_valid_before_utc <= now
        seen.add(made.sha256)
        now += timedelta(hours=6)
    assert first.sha256 in seen
    assert 4 <= len(seen) <= 5


def test_two_brokers_renew_to_the_same(tmp_path: Path) -> None:
    sources = [CertificateSource(WebTransportSettings(), tmp_path, NOW) for _ in range(2)]
    assert len({source.development(NOW + 11 * DAY) for source in sources}) == 1


def test_a_renewal_that_fails_is_logged_once_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = CertificateSource(WebTransportSettings(), tmp_path, NOW)
    first = source.development(NOW)
    (tmp_path / DEVELOPMENT_FILE).unlink()
    (tmp_path / DEVELOPMENT_FILE).mkdir()
    later = NOW + 11 * DAY
    caplog.clear()
    for seconds in range(3):
        assert source.development(later + seconds * SECOND) == first
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    (tmp_path / DEVELOPMENT_FILE).rmdir()
    assert source.development(later + 3 * SECOND) != first


# What clients are told.


def test_discovery_tells_all(one: Certificate) -> None:
    assert discovery_document("localhost:8080", 4433, one) == {
        "protocol": "catbus.v1",
        "websocket": "ws://localhost:8080/ws",
        "webtransport": "https://localhost:4433",
        "certificate_hash": base64.b64encode(one.sha256).decode(),
        "certificate": one.certificate_pem,
    }
    assert "PRIVATE" not in json.dumps(discovery_document("localhost", 4433, one))


def test_discovery_tells_of_a_certificate_only_when_it_is_self_made() -> None:
    assert discovery_document("bus.example", 443, None, secure=True) == {
        "protocol": "catbus.v1",
        "websocket": "wss://bus.example/ws",
        "webtransport": "https://bus.example:443",
    }


def test_discovery_without_webtransport(one: Certificate) -> None:
    assert discovery_document("a", None, one) == {"protocol": "catbus.v1", "websocket": "ws://a/ws"}


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("127.0.0.1:8080", "127.0.0.1"),
        ("[::1]:8080", "[::1]"),
        ("[2001:db8::1]", "[2001:db8::1]"),
        ("[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.1]"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("catbus_broker:65535", "catbus_broker"),
    ],
)
def test_discovery_goes_by_the_name_of_the_request(host: str, name: str) -> None:
    found = discovery_document(host, 4433, None)
    assert found["websocket"] == f"ws://{host}/ws"
    assert found["webtransport"] == f"https://{name}:4433"


@pytest.mark.parametrize(
    "host",
    [
        "", ":8080", "::1", "[::1", "[]", "[:::]", "[1.2.3.4]", "[::1%eth0]", "a:0", "a:65536", "a:", "a:b", "a:1:2",
        "a/b", "a?b", "a#b", "user@a", "a b", "a, b", "a\n", "a\r\nb: c", "a:1\n", "a\\b", "<a>", 'a"', "ä.example",
        "a:\u0661", "a" * 254,
    ],
)  # fmt: skip
def test_discovery_has_no_urls_for_what_is_no_host(host: str, one: Certificate) -> None:
    assert discovery_document(host, 4433, one).keys() == {"protocol", "certificate_hash", "certificate"}
