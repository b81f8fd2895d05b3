"""A real HTTP server on loopback whose paths misbehave in named ways; for tests of fetching."""

from __future__ import annotations

import gzip
import io
import ssl
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image as pil


def png(size: tuple[int, int] = (40, 30), colour: tuple[int, int, int] = (200, 30, 60)) -> bytes:
    buffer = io.BytesIO()
    pil.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = png()
BOMB = gzip.compress(bytes(8_000_000))


class Web:
    """``url(path)``; ``seen``: (path, Host header) of every request. Redirect with ``/to?WHERE``, ``/hops/N`` counts down."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.names: list[str] = []
        """Names that TLS clients asked for."""
        self.seen: list[tuple[str, str]] = []
        self.stop = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.server.handle_error = lambda request, address: None  # clients that hang up are part of the tests
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        self.port: int = self.server.server_address[1]

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


@contextmanager
def serve(tls: ssl.SSLContext | None = None) -> Iterator[Web]:
    web = Web(tls)
    thread = threading.Thread(target=web.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.stop.set()
        web.server.shutdown()
        web.server.server_close()
        thread.join()


def _handler(web: Web) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format, *args) -> None:
            pass

        def do_GET(self) -> None:
            web.seen.append((self.path, self.headers.get("Host", "")))
            self.close_connection = True
            path, _, query = self.path.partition("?")
            name, *rest = path.strip("/").split("/")
            with suppress(BrokenPipeError, ConnectionResetError, ssl.SSLError):  # clients give up, as many tests want
                getattr(self, name.partition(".")[0] or "picture", self.missing)(query, *rest)

        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for key, value in ({"Content_Length": str(len(body))} | headers).items():
                if value:
                    self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def picture(self, query: str) -> None:
            self.answer(PICTURE, Content_Type="image/png")

        def missing(self, query: str, *rest: str) -> None:
            self.answer(b"no such page", 404)

        def forbidden(self, query: str) -> None:
            self.answer(b"", 403)

        def failing(self, query: str) -> None:
            self.answer(b"", 500)

        def page(self, query: str) -> None:
            self.answer(b"<!DOCTYPE html><html><body>a picture</body></html>", Content_Type="image/png")

        def nothing(self, query: str) -> None:
            self.answer(b"")

        def to(self, query: str) -> None:
            self.answer(b"", 302, Location=query)

        def hops(self, query: str, count: str) -> None:
            self.answer(b"", 307, Location=f"/hops/{int(count) - 1}" if int(count) > 1 else "/picture.png")

        def loop(self, query: str) -> None:
            self.answer(b"", 301, Location="/loop")

        def cut(self, query: str) -> None:
            self.answer(PICTURE[:50], Content_Length=str(len(PICTURE)))

        def announced(self, query: str) -> None:
            self.answer(b"x", Content_Length=str(10**12))

        def endless(self, query: str) -> None:
            self.answer(b"", Content_Length="", Connection="close")
            while not web.stop.is_set():
                self.wfile.write(b"x" * 65536)

        def zipped(self, query: str) -> None:
            self.answer(gzip.compress(PICTURE), Content_Encoding="gzip")

        def deflated(self, query: str) -> None:
            self.answer(zlib.compress(PICTURE), Content_Encoding="deflate")

        def bomb(self, query: str) -> None:
            self.answer(BOMB, Content_Encoding="gzip")

        def halfzip(self, query: str) -> None:
            self.answer(gzip.compress(PICTURE)[:-20], Content_Encoding="gzip")

        def notzip(self, query: str) -> None:
            self.answer(b"this is no gzip", Content_Encoding="gzip")

        def brotli(self, query: str) -> None:
            self.answer(PICTURE, Content_Encoding="br")

        def hang(self, query: str) -> None:
            web.stop.wait(20)

        def late(self, query: str) -> None:
            """After as many seconds as it is asked for."""
            web.stop.wait(float(query.partition("&")[0]))
            self.answer(PICTURE, Content_Type="image/png")

        def drip(self, query: str) -> None:
            self.answer(b"", Content_Length="100000")
            self._drip(b"x")

        def dripheaders(self, query: str) -> None:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            self._drip(b"y")

        def babble(self, query: str) -> None:
            self.wfile.write(b"+OK this is a mail server\r\n")

        def _drip(self, byte: bytes) -> None:
            while not web.stop.wait(0.02):
                self.wfile.write(byte)
                self.wfile.flush()

    return Handler
