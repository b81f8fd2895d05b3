"""A real HTTP server on loopback that answers as badly as the internet does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer


class Handler(BaseHTTPRequestHandler):
    picture: bytes = b""

    def do_GET(self) -> None:
        getattr(self, "answer_" + self.path.strip("/").replace("-", "_"), self.answer_missing)()

    def send(self, body: bytes, length: int | None = None, kind: str = "image/png") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def redirect(self, target: str) -> None:
        self.send_response(302)
        self.send_header("Location", target)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer_ok(self) -> None:
        self.send(self.picture)

    def answer_missing(self) -> None:
        self.send_error(404)

    def answer_big(self) -> None:
        self.send(b"x", length=1 << 40)

    def answer_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(64):
                self.wfile.write(bytes(1 << 16))
        except OSError:
            self.close_connection = True

    def answer_slow(self) -> None:
        time.sleep(0.8)

    def answer_cut(self) -> None:
        self.send(self.picture[:50], length=len(self.picture))

    def answer_page(self) -> None:
        self.send(b"<!doctype html><title>Log in</title>", kind="text/html")

    def answer_empty(self) -> None:
        self.send(b"")

    def answer_loop(self) -> None:
        self.redirect("/loop")

    def answer_to_file(self) -> None:
        self.redirect("file:///etc/passwd")

    def answer_to_loopback(self) -> None:
        self.redirect(f"http://127.0.0.1:{self.server.server_address[1]}/ok")

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # the parent's asks the network for this machine's name


@contextmanager
def serve(picture: bytes) -> Iterator[tuple[int, list[str]]]:
    """(port, log of paths asked for), on every loopback address."""
    asked: list[str] = []

    class Logged(Handler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

    Logged.picture = picture
    server = Server(("", 0), Logged)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1], asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
