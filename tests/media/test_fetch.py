"""Fetching: real local servers that redirect, drip, hang, overflow and lie; files under a root; base64."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpcore
import pytest
from media import web as web_module

from mirada.errors import (
    MediaDecodeError,
    MediaNotFound,
    MediaRefused,
    MediaTimeout,
    MediaTooLarge,
    MediaUnsupported,
    SettingsError,
)
from mirada.media import download
from mirada.media.download import is_public
from mirada.media.fetch import fetch, locate
from mirada.media.limits import FetchLimits, show

LOCAL = FetchLimits(allow_private=True, seconds=5)
SHORT = FetchLimits(allow_private=True, seconds=0.3)


@pytest.fixture(scope="module")
def server() -> Iterator:
    with web_module.serve() as web:
        yield web


@pytest.fixture
def web(server):
    server.seen.clear()
    return server


def resolver(monkeypatch: pytest.MonkeyPatch, table: dict[str, list[str]]) -> list[str]:
    """Names resolve as ``table`` says; returns the log of names asked."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host, port, *args, **more):
        if host not in table and host.strip("0123456789.") == "":  # sockets ask it about numbers, too
            return real(host, port, *args, **more)
        asked.append(host)
        if host not in table:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in table[host]]

    monkeypatch.setattr(download.socket, "getaddrinfo", getaddrinfo)
    return asked


def connections(monkeypatch: pytest.MonkeyPatch, to: str = "127.0.0.1") -> list[str]:
    """Connections go to ``to`` instead of where they should; returns the log of the addresses they should have gone to."""
    real, log = httpcore.SyncBackend.connect_tcp, []

    def connect_tcp(self, host, port, *rest, **more):
        log.append(host)
        return real(self, to, port, *rest, **more)

    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connect_tcp)
    return log


def test_a_picture_arrives(web) -> None:
    assert fetch(web.url("/picture.png"), LOCAL) == web_module.PICTURE
    assert web.seen == [("/picture.png", f"127.0.0.1:{web.port}")]


@pytest.mark.parametrize("path", ["/zipped", "/deflated", "/hops/3", "/to?/picture.png"])
def test_encodings_and_redirects_arrive(web, path: str) -> None:
    assert fetch(web.url(path), LOCAL) == web_module.PICTURE


CASES = [
    ("/missing", MediaNotFound, "404"),
    ("/forbidden", MediaNotFound, "403"),
    ("/failing", MediaNotFound, "500"),
    ("/nothing", MediaDecodeError, "empty"),
    ("/cut", MediaDecodeError, "broke off"),
    ("/babble", MediaDecodeError, "does not speak HTTP"),
    ("/halfzip", MediaDecodeError, "ends inside its gzip"),
    ("/notzip", MediaDecodeError, "broken gzip"),
    ("/brotli", MediaUnsupported, "'br'"),
    ("/announced", MediaTooLarge, "1,000,000,000,000"),
    ("/endless", MediaTooLarge, "limit of 1,000,000"),
    ("/bomb", MediaTooLarge, "limit of 1,000,000"),
    ("/hops/4", MediaRefused, "more than 3 times"),
    ("/loop", MediaRefused, "more than 3 times"),
    ("/to?file:///etc/passwd", MediaRefused, "scheme 'file'"),
    ("/to?ftp://example.org/a.png", MediaRefused, "scheme 'ftp'"),
    ("/to?http://[bad", MediaUnsupported, "not an address"),
]


@pytest.mark.parametrize(("path", "error", "words"), CASES)
def test_servers_that_misbehave(web, path: str, error: type, words: str) -> None:
    with pytest.raises(error) as caught:
        fetch(web.url(path), FetchLimits(allow_private=True, seconds=5, bytes=1_000_000))
    assert type(caught.value) is error and words in str(caught.value) and caught.value.fix


def test_a_bomb_is_never_inflated_beyond_the_limit() -> None:
    pieces = download._decoded([web_module.BOMB], "gzip", "a bomb", 1000)
    assert len(next(pieces)) == 1001
    with pytest.raises(MediaTooLarge):
        next(pieces)


@pytest.mark.parametrize("path", ["/hang", "/drip", "/dripheaders"])
def test_the_clock_covers_the_whole_fetch(web, path: str) -> None:
    start = time.monotonic()
    with pytest.raises(MediaTimeout, match=r"0\.3 seconds"):
        fetch(web.url(path), SHORT)
    assert time.monotonic() - start < 10.0


def test_the_clock_covers_the_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.socket, "getaddrinfo", lambda *args, **more: time.sleep(5) or [])
    start = time.monotonic()
    with pytest.raises(MediaTimeout):
        fetch("http://slow.example/a.png", SHORT)
    assert time.monotonic() - start < 3.0


def test_the_clock_runs_on_over_redirects(web) -> None:
    start = time.monotonic()
    with pytest.raises(MediaTimeout):
        fetch(web.url("/to?/hang"), SHORT)
    assert time.monotonic() - start < 10.0


def test_a_closed_port_is_not_found() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(MediaNotFound, match="cannot be reached"):
        fetch(f"http://127.0.0.1:{port}/a.png", LOCAL)


def test_an_unknown_host_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver(monkeypatch, {})
    with pytest.raises(MediaNotFound, match=r"nowhere\.example"):
        fetch("https://nowhere.example/a.png", LOCAL)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]"]
)
def test_loopback_in_every_spelling_is_refused(web, host: str) -> None:
    with pytest.raises(MediaRefused, match="not on the public internet"):
        fetch(web.url("/picture.png", host), FetchLimits())
    assert web.seen == []


@pytest.mark.parametrize(
    "address", ["10.1.2.3", "192.168.0.1", "172.16.0.9", "169.254.169.254", "100.64.0.1", "::ffff:10.0.0.1"]
)
def test_a_name_that_resolves_to_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    log = connections(monkeypatch)
    resolver(monkeypatch, {"pictures.example": ["93.184.216.34", address]})
    with pytest.raises(MediaRefused, match=address):
        fetch("http://pictures.example/a.png", FetchLimits())
    assert log == []


def test_a_redirect_to_loopback_is_refused(web, monkeypatch: pytest.MonkeyPatch) -> None:
    log = connections(monkeypatch)
    resolver(monkeypatch, {"pictures.example": ["93.184.216.34"]})
    with pytest.raises(MediaRefused, match=r"127\.0\.0\.1"):
        fetch(web.url(f"/to?{web.url('/picture.png')}", "pictures.example"), FetchLimits())
    assert log == ["93.184.216.34"] and len(web.seen) == 1  # the second request was never made


def test_the_address_connected_to_is_the_one_that_was_checked(web, monkeypatch: pytest.MonkeyPatch) -> None:
    log = connections(monkeypatch)
    table = {"pictures.example": ["93.184.216.34"]}
    asked = resolver(monkeypatch, table)
    real = download.is_public

    def rebind(address: str) -> bool:
        table["pictures.example"] = ["127.0.0.1"]  # from the check on, the name means something else
        return real(address)

    monkeypatch.setattr(download, "is_public", rebind)
    assert fetch(web.url("/picture.png", "pictures.example"), FetchLimits()) == web_module.PICTURE
    assert asked == ["pictures.example"] and log == ["93.184.216.34"]
    assert web.seen == [("/picture.png", f"pictures.example:{web.port}")]  # the name still reaches the server


def test_the_next_address_is_tried_when_one_does_not_answer(web, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver(monkeypatch, {"pictures.example": ["127.0.0.9", "127.0.0.1"]})
    assert fetch(web.url("/picture.png", "pictures.example"), LOCAL) == web_module.PICTURE


def test_proxies_of_the_environment_are_not_used(web, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(web.url("/picture.png"), LOCAL) == web_module.PICTURE


PUBLIC = ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
NOT_PUBLIC = (
    "0.0.0.0 10.0.0.1 100.64.0.1 127.0.0.1 127.255.255.254 169.254.169.254 172.31.255.255 192.0.0.8 192.0.2.1 192.88.99.1 "
    "192.168.1.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 240.0.0.1 255.255.255.255 :: ::1 ::7f00:1 ::ffff:127.0.0.1 "
    "::ffff:169.254.169.254 64:ff9b::7f00:1 64:ff9b:1::1 100::1 2001::1 2001:db8::1 2002:7f00:1:: 2002:808:808:: 5f00::1 "
    "fc00::1 fd00:ec2::254 fe80::1 fe80::1%2 fec0::1 ff02::1"
)


def test_which_addresses_are_public() -> None:
    assert [address for address in PUBLIC if not is_public(address)] == []
    assert [address for address in NOT_PUBLIC.split() if is_public(address)] == []


@pytest.mark.parametrize(
    ("source", "error", "word"),
    [
        ("ftp://example.org/a.png", MediaUnsupported, "ftp"),
        ("gopher://127.0.0.1/a", MediaUnsupported, "gopher"),
        ("http://", MediaUnsupported, "host"),
        ("http:///a.png", MediaUnsupported, "host"),
        ("http://user:secret@example.org/a.png", MediaUnsupported, "user name"),
        ("http://example.org:99999/a.png", MediaUnsupported, "not an address"),
        ("http://exa mple.org/a.png", MediaUnsupported, "not an address"),
    ],
)
def test_addresses_that_are_none(source: str, error: type, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver(monkeypatch, {})
    with pytest.raises(error) as caught:
        fetch(source, FetchLimits())
    assert word in str(caught.value) and "secret" not in str(caught.value)


def test_names_in_messages_hold_no_secrets_and_no_megabytes() -> None:
    assert show("https://u:p@host/a.png?token=abc#x") == "'https://host/a.png'"
    assert len(show("data:image/png;base64," + "A" * 10**6)) < 80
    assert len(show("x" * 5000)) < 130
    assert show(b"abc") == "3 bytes"


# Files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.png").write_bytes(web_module.PICTURE)
    (tmp_path / "rootless").mkdir()
    (tmp_path / "rootless" / "secret.png").write_bytes(web_module.PICTURE)
    (root / "link.png").symlink_to(tmp_path / "rootless" / "secret.png")
    (root / "inside.png").symlink_to(root / "sub" / "a.png")
    (root / "folder").symlink_to(tmp_path / "rootless")
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    return root


@pytest.mark.parametrize("name", ["sub/a.png", "inside.png", "sub/../sub/a.png"])
def test_files_under_the_root_are_read(tree: Path, name: str) -> None:
    for source in (tree / name, str(tree / name), f"file://{tree}/{name}", f"file:{tree}/{name}"):
        assert fetch(source, FetchLimits.serving(tree)) == web_module.PICTURE


OUTSIDE = ["link.png", "folder/secret.png", "../rootless/secret.png", "../rootless/absent.png", "sub/../../rootless/secret.png"]


@pytest.mark.parametrize("name", [*OUTSIDE, "%2e%2e/rootless/secret.png"])
def test_files_outside_the_root_are_refused(tree: Path, name: str) -> None:
    plain = name.replace("%2e", ".")
    for source in (tree / plain, f"file://{tree}/{name}"):
        with pytest.raises(MediaRefused, match="outside the allowed folder") as refused:
            fetch(source, FetchLimits.serving(tree))
        assert refused.value.__cause__ is None  # and not itself: whoever follows causes would never end
    if "absent" not in name:
        assert fetch(tree / plain, FetchLimits()) == web_module.PICTURE  # without a root it may be read


@pytest.mark.parametrize("source", ["file:///etc/passwd", "/etc/passwd", Path("/etc/passwd"), "file:/etc/passwd"])
def test_serving_reads_no_files(source, tree: Path) -> None:
    with pytest.raises(MediaRefused, match="not allowed"):
        fetch(source, FetchLimits.serving())
    with pytest.raises(MediaRefused, match="outside"):
        fetch(source, FetchLimits.serving(tree))


@pytest.mark.parametrize(
    ("name", "error", "word"),
    [
        ("absent.png", MediaNotFound, "no file"),
        ("sub", MediaUnsupported, "not a plain file"),
        ("pipe", MediaUnsupported, "not a plain file"),
        ("loop", MediaNotFound, "no file"),
        ("a\0b", MediaNotFound, "no file"),
        ("x" * 5000, MediaNotFound, "too long"),
    ],
)
def test_paths_that_cannot_be_read(tree: Path, name: str, error: type, word: str) -> None:
    for limits in (FetchLimits(), FetchLimits.serving(tree)):
        with pytest.raises(error, match=word):
            fetch(f"{tree}/{name}", limits)


def test_devices_are_refused() -> None:
    with pytest.raises(MediaUnsupported, match="not a plain file"):
        fetch("/dev/zero", FetchLimits())


def test_a_file_swapped_for_a_link_after_the_check_is_not_followed(tree: Path) -> None:
    from mirada.media.fetch import read_file

    limits = FetchLimits.serving(tree)
    found = locate(tree / "sub" / "a.png", limits)
    assert isinstance(found, Path)
    found.unlink()
    found.symlink_to("/etc/passwd")
    with pytest.raises(MediaNotFound):
        read_file(found, limits)


def test_limits_of_bytes(tree: Path) -> None:
    size = len(web_module.PICTURE)
    assert fetch(tree / "sub/a.png", FetchLimits(bytes=size)) == web_module.PICTURE
    for source in (tree / "sub/a.png", web_module.PICTURE, bytearray(web_module.PICTURE)):
        with pytest.raises(MediaTooLarge, match=f"{size}.*limit of {size - 1}"):
            fetch(source, FetchLimits(bytes=size - 1))
    assert fetch(tree / "sub/a.png", FetchLimits(bytes=1), max_bytes=size) == web_module.PICTURE


@pytest.mark.parametrize(
    ("uri", "error", "word"),
    [
        ("data:image/png,rawbytes", MediaUnsupported, "not base64"),
        ("data:image/png;base64", MediaUnsupported, "not base64"),
        ("data:image/png;base64,", MediaDecodeError, "empty"),
        ("data:image/png;base64,@@@@", MediaDecodeError, "broken base64"),
        ("data:image/png;base64,AAAAA", MediaDecodeError, "broken base64"),
        ("data:image/png;base64,ümlaut=", MediaDecodeError, "broken base64"),
        ("data:image/png;base64," + "A" * 4000, MediaTooLarge, "limit of 1,000"),
    ],
)
def test_data_addresses_that_are_broken(uri: str, error: type, word: str) -> None:
    with pytest.raises(error, match=word):
        fetch(uri, FetchLimits(bytes=1000))


@pytest.mark.parametrize("source", [None, 7, 1.5, ["a.png"], {"url": "a.png"}, object()])
def test_sources_of_another_type(source) -> None:
    with pytest.raises(MediaUnsupported, match=type(source).__name__):
        fetch(source, FetchLimits())


@pytest.mark.parametrize("settings", [{"bytes": 0}, {"pixels": -1}, {"seconds": 0}, {"redirects": -1}])
def test_limits_that_let_nothing_through(settings: dict) -> None:
    with pytest.raises(SettingsError, match=next(iter(settings))):
        FetchLimits(**settings)
    assert FetchLimits(redirects=0).redirects == 0


def test_no_redirects_when_none_are_allowed(web) -> None:
    with pytest.raises(MediaRefused, match="0 times"):
        fetch(web.url("/hops/1"), FetchLimits(allow_private=True, redirects=0))


# TLS


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """An https server whose certificate names pictures.example, trusted by the fetcher."""
    if (program := shutil.which("openssl")) is None:
        pytest.skip("needs the openssl program to make a certificate")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=pictures.example"
    extra = ["-addext", "subjectAltName=DNS:pictures.example", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([program, *make.split(), *extra], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    names: list[str] = []
    context.sni_callback = lambda sock, name, context: names.append(name)
    trusting = ssl.create_default_context(cafile=str(cert))
    monkeypatch.setattr(download, "_tls", lambda: trusting)
    with web_module.serve(context) as web:
        web.names = names
        yield web


def test_tls_is_checked_against_the_name_though_the_address_is_connected_to(secure, monkeypatch: pytest.MonkeyPatch) -> None:
    log = connections(monkeypatch)
    resolver(monkeypatch, {"pictures.example": ["93.184.216.34"], "other.example": ["93.184.216.34"]})
    url = secure.url("/picture.png", "pictures.example").replace("http:", "https:")
    assert fetch(url, FetchLimits()) == web_module.PICTURE
    assert secure.names == ["pictures.example"] and log == ["93.184.216.34"]
    with pytest.raises(MediaNotFound, match="certificate"):
        fetch(url.replace("pictures", "other"), FetchLimits())


def test_an_unknown_certificate_is_refused(secure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_tls", ssl.create_default_context)
    resolver(monkeypatch, {"pictures.example": ["127.0.0.1"]})
    with pytest.raises(MediaNotFound, match="certificate"):
        fetch(secure.url("/picture.png", "pictures.example").replace("http:", "https:"), LOCAL)


def test_a_server_that_never_finishes_the_handshake_ends_with_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(MediaTimeout):
            fetch(f"https://127.0.0.1:{silent.getsockname()[1]}/a.png", SHORT)
        assert time.monotonic() - start < 10.0
