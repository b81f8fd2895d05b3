"""One server process for the whole room, and clients of it."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import openai
import pytest
from oracle import judged
from serving import KEY, Running, png, start


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with start(tmp_path_factory.mktemp("serve"), KEY) as running:
        yield running
        running.judge()
        record = running.folder / "answers.jsonl"  # tests of live video alone leave none
        assert not record.exists() or judged, "answers were given, and none was judged"


@pytest.fixture(autouse=True)
def _every_answer_is_judged(request):
    server = request.getfixturevalue("server") if "server" in request.fixturenames else None
    yield
    if isinstance(server, Running):
        server.judge()


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="session")
def post(server):
    """``post(body, path=..., **headers) -> httpx.Response``."""
    with httpx.Client(base_url=server.url, timeout=60) as http:

        def send(body, path="/v1/chat/completions", **headers):
            said = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            return http.post(path, content=data, headers=said)

        yield send


@pytest.fixture(scope="session")
def site():
    """A web server on loopback with a picture."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            data = png()
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()
