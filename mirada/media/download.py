"""HTTP(S) under limits: the address that is checked is the address that is connected to, and the clock covers everything.

Names are resolved and judged inside the network backend of httpcore, at each connection; so a redirect is judged like the
first address, and a name that changes its mind between check and use (DNS rebinding) gains nothing. Every wait on the
socket is cut to what is left of the deadline, so a server that drips bytes, in headers or body, ends with it.
"""

from __future__ import annotations

import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import httpcore
import httpx

from mirada.errors import MediaDecodeError, MediaNotFound, MediaRefused, MediaTimeout, MediaUnsupported
from mirada.media.limits import Allowance, FetchLimits, show, too_large

REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# What some versions of Python call global, and tunnels that can lead anywhere.
_SPECIAL = [
    *map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "64:ff9b:1::/48", "100::/64")),
    *map(ipaddress.ip_network, ("2001::/23", "2002::/16", "5f00::/16", "fec0::/10")),
]


def download(url: str, limits: FetchLimits, most: int, allowance: Allowance | None = None) -> bytes:
    """The body behind ``url``, decoded, at most ``most`` bytes, within ``limits.seconds`` and what ``allowance`` has left.

    Raises MediaRefused (address not public, scheme, too many redirects), MediaTimeout, MediaTooLarge, MediaNotFound (no such
    host, no answer, a status other than 200), MediaDecodeError (connection cut short), MediaUnsupported (not a URL, encoding).
    """
    deadline = time.monotonic() + limits.seconds
    backend = _Guarded(deadline if allowance is None else min(deadline, allowance.deadline), limits.allow_private)
    target, name = _parse(url), show(url)
    try:
        for _ in range(limits.redirects + 1):
            body, target = _hop(target, name, backend, most, allowance)
            if target is None:
                return body
    except httpcore.TimeoutException as error:
        if backend.deadline < deadline:
            raise MediaTimeout(
                f"{name} and what else this request names did not arrive within {limits.request_seconds:g} seconds",
                "name fewer addresses, or raise FetchLimits.request_seconds",
            ) from error
        raise MediaTimeout(
            f"{name} did not arrive within {limits.seconds:g} seconds", "try again, or raise FetchLimits.seconds"
        ) from error
    except httpcore.RemoteProtocolError as error:
        raise MediaDecodeError(f"the server of {name} broke off or does not speak HTTP ({error})", "try again") from error
    except (httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError, OSError) as error:
        raise MediaNotFound(
            f"{name} cannot be reached ({error})", "check the address; proxies of the environment are not used"
        ) from error
    raise MediaRefused(
        f"{name} redirects more than {limits.redirects} times", "give the final address, or raise FetchLimits.redirects"
    )


def _parse(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise MediaUnsupported(f"{show(url)} is not an address ({error})", "write http(s)://host/path") from error
    if parsed.scheme not in ("http", "https"):
        raise MediaRefused(f"a redirect leads to the scheme {parsed.scheme!r}", "only http and https are followed")
    if re.search(r"[\s%\[\]]", parsed.host) or not 0 < (parsed.port or 80) < 65536:
        raise MediaUnsupported(f"{show(url)} is not an address (its host or port)", "write http(s)://host/path")
    if not parsed.host:
        raise MediaUnsupported(f"{show(url)} names no host", "write http(s)://host/path")
    if parsed.userinfo:
        raise MediaUnsupported(f"{show(url)} carries a user name", "remove it; fetch the file yourself and give its bytes")
    return parsed


@cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)


def _hop(
    url: httpx.URL, name: str, backend: _Guarded, most: int, allowance: Allowance | None
) -> tuple[bytes, httpx.URL | None]:
    """One request: the body, or where it redirects."""
    target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    headers = [(b"Host", url.netloc), (b"Accept", b"image/*, video/*, */*;q=0.5"), (b"Accept-Encoding", b"identity")]
    headers.append((b"User-Agent", b"mirada"))
    context = _tls() if url.scheme == "https" else None
    with (
        httpcore.ConnectionPool(ssl_context=context, network_backend=backend) as pool,
        pool.stream("GET", target, headers=headers) as response,
    ):
        facts = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in response.headers}
        if response.status in REDIRECTS and "location" in facts:
            return b"", _parse(str(_join(url, facts["location"])))
        if response.status != 200:
            raise MediaNotFound(
                f"the server of {name} answered {response.status}", "check the address, and that it needs no login"
            )
        length = facts.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise too_large(name, most, int(length))
        chunks = _decoded(response.iter_stream(), facts.get("content-encoding", ""), name, most)
        return _collect(chunks, name, most, allowance), None


def _join(url: httpx.URL, location: str) -> httpx.URL:
    try:
        return url.join(location)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise MediaUnsupported(
            f"{show(str(url))} redirects to something that is not an address", "give the final one"
        ) from error


def _collect(chunks: Iterable[bytes], name: str, most: int, allowance: Allowance | None) -> bytes:
    body = bytearray()
    for chunk in chunks:
        body += chunk
        if allowance is not None:
            allowance.take(len(chunk))
        if len(body) > most:
            raise too_large(name, most)
    if not body:
        raise MediaDecodeError(f"the answer for {name} is empty", "check the address")
    return bytes(body)


def _decoded(chunks: Iterable[bytes], encoding: str, name: str, most: int) -> Iterator[bytes]:
    """Undo a content encoding that was not asked for, never making more than a little over ``most`` bytes at once."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        yield from chunks
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise MediaUnsupported(f"{name} comes with the content encoding {encoding!r}", "serve it without, or with gzip")
    inflate = zlib.decompressobj(wbits=47 if "gzip" in encoding else 15)  # 47: gzip or zlib, by its header
    try:
        for chunk in chunks:
            yield inflate.decompress(chunk, most + 1)
            if inflate.unconsumed_tail:
                raise too_large(name, most)
    except zlib.error as error:
        raise MediaDecodeError(f"{name} holds broken {encoding} ({error})", "serve the plain bytes") from error
    if not inflate.eof:
        raise MediaDecodeError(f"{name} ends inside its {encoding}", "try again")


class _Guarded(httpcore.NetworkBackend):
    """Connects only to addresses that were resolved and judged here, and cuts every wait to the deadline."""

    def __init__(self, deadline: float, allow_private: bool) -> None:
        self.deadline = deadline
        self.allow_private = allow_private
        self.inner = httpcore.SyncBackend()

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None, socket_options: Any = None
    ) -> httpcore.NetworkStream:
        addresses = resolve(host, port, left(self.deadline))
        if not self.allow_private:
            for address in addresses:
                if not is_public(address):
                    raise MediaRefused(
                        f"{host!r} leads to {address}, which is not on the public internet",
                        "give a public address or the bytes, or set FetchLimits.allow_private",
                    )
        failure: Exception = httpcore.ConnectError(f"{host!r} has no address")
        for address in addresses:
            try:
                stream = self.inner.connect_tcp(address, port, left(self.deadline), local_address, socket_options)
                return _Stream(stream, self.deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Any = None
    ) -> httpcore.NetworkStream:
        raise MediaRefused(f"unix socket {path!r}", "only http and https over TCP are used")

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, left(self.deadline)))


class _Stream(httpcore.NetworkStream):
    """A connection whose every wait ends at the deadline."""

    def __init__(self, inner: httpcore.NetworkStream, deadline: float) -> None:
        self.inner = inner
        self.deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.inner.read(max_bytes, left(self.deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.inner.write(buffer, left(self.deadline))

    def close(self) -> None:
        self.inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self.inner.start_tls(ssl_context, server_hostname, left(self.deadline)), self.deadline)

    def get_extra_info(self, info: str) -> Any:
        return self.inner.get_extra_info(info)


def left(deadline: float) -> float:
    """Seconds until ``deadline`` (of time.monotonic); raises httpcore.ReadTimeout when there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise httpcore.ReadTimeout("the time for the fetch is over")
    return seconds


def resolve(host: str, port: int, seconds: float) -> list[str]:
    """Every address of ``host``, numeric, in the resolver's order. getaddrinfo cannot be stopped, so it runs beside."""
    answer: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answer.put(list(dict.fromkeys(str(entry[4][0]) for entry in found)))
        except (OSError, UnicodeError) as error:
            answer.put(error)

    threading.Thread(target=ask, name="mirada-resolve", daemon=True).start()
    try:
        found = answer.get(timeout=seconds)
    except queue.Empty:
        raise httpcore.ConnectTimeout(f"{host!r} did not resolve") from None
    if isinstance(found, Exception):
        raise httpcore.ConnectError(f"{host!r} does not resolve: {found}") from found
    return found


def is_public(address: str) -> bool:
    """Whether a numeric address belongs to the public internet. IPv6 that only wraps IPv4 is judged by what it wraps."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = ip.ipv4_mapped or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
        if wrapped is not None:
            return is_public(str(wrapped))
    if any(ip in network for network in _SPECIAL if network.version == ip.version):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)
