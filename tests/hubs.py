"""A server on loopback that speaks the file APIs of both hubs, and cuts, lies or refuses where a test asks for it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT, OLDER = "a" * 40, "b" * 40
LFS_FROM = 1000
"""Files of at least this many bytes are kept as the hub keeps large ones: named by SHA-256, sent from another host."""


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0
    """Bytes of the body that were sent."""


@dataclass
class Hub:
    """``files``: name -> content. ``cuts``: name -> bytes after which each of the next answers breaks off."""

    files: dict[str, bytes]
    commit: str = COMMIT
    token: str | None = None
    gated: bool = False
    model: str = "org/tiny-vl"
    cuts: dict[str, list[int]] = field(default_factory=dict)
    answers: dict[str, list[int]] = field(default_factory=dict)
    """Path part -> statuses that the next requests for it get instead."""
    ranges: bool = True
    requests: list[Request] = field(default_factory=list)
    altered: dict[str, bytes] = field(default_factory=dict)
    """Name -> what is sent in place of the content that the listing states."""
    url: str = ""
    other: str = ""
    """The same server under another name, as a storage host is."""

    def sent(self, name: str) -> list[int]:
        """Bytes sent in each answer that carried file ``name``."""
        return [r.sent for r in self.requests if r.status in (200, 206) and re.search(rf"[/=]{re.escape(name)}$", r.path)]

    def count(self, part: str) -> int:
        return sum(part in r.path for r in self.requests)


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    server.handle_error = lambda request, address: None
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    hub.other = f"http://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format, *args) -> None:
            pass

        def do_GET(self) -> None:
            self.close_connection = True
            parts = urlsplit(self.path)
            self.request_seen = Request(unquote(self.path), dict(self.headers))
            hub.requests.append(self.request_seen)
            with suppress(BrokenPipeError, ConnectionResetError):
                for part, statuses in hub.answers.items():
                    if part in self.path and statuses:
                        self.answer(b"", statuses.pop(0))
                        return
                self.route(parts.path, parse_qs(parts.query))

        def route(self, path: str, query: dict[str, list[str]]) -> None:
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
                self.hf_listing(found[1], unquote(found[2]))
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.hf_file(found[1], found[2], unquote(found[3]))
            elif found := re.fullmatch(r"/storage/(.+)", path):
                self.content(unquote(found[1]))
            elif found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path):
                self.ms_listing(found[1], query)
            elif found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo", path):
                if self.ms_allowed(found[1], query):
                    self.content(query["FilePath"][0])
            else:
                self.answer(b"<html>no such page</html>", 404)

        def answer(
            self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, stop: int | None = None
        ) -> None:
            self.request_seen.status = status
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            body = body[:stop]
            self.wfile.write(body)
            self.request_seen.sent = len(body)

        def json(self, value: object, status: int = 200) -> None:
            self.answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

        # -- Hugging Face

        def hf_refused(self, model: str) -> bool:
            said = self.headers.get("Authorization")
            if said is not None and said != f"Bearer {hub.token}":
                self.answer(b"", 401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            elif model != hub.model or (hub.token and said is None and not hub.gated):
                self.answer(b"", 401 if said is None else 404, {"X-Error-Code": "RepoNotFound"})
            else:
                return False
            return True

        def hf_listing(self, model: str, revision: str) -> None:
            if self.hf_refused(model):
                return
            if revision not in ("main", "pr/1", hub.commit):
                self.answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = []
            for name, data in hub.files.items():
                entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git_hash(data)}
                if len(data) >= LFS_FROM:
                    entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                siblings.append(entry)
            self.json({"id": model, "sha": hub.commit, "gated": hub.gated, "siblings": siblings})

        def hf_file(self, model: str, commit: str, name: str) -> None:
            if hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.answer(b"", 403 if "Authorization" in self.headers else 401, {"X-Error-Code": "GatedRepo"})
                return
            if self.hf_refused(model):
                return
            if commit != hub.commit or name not in hub.files:
                self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
                return
            data = hub.files[name]
            if len(data) >= LFS_FROM:
                facts = {
                    "X-Repo-Commit": hub.commit,
                    "X-Linked-Size": str(len(data)),
                    "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                    "Location": f"{hub.other}/storage/{name}",
                }
                self.answer(b"", 302, facts)
            else:
                self.content(name)

        def content(self, name: str) -> None:
            data = hub.altered.get(name, hub.files[name])
            cuts = hub.cuts.get(name)
            stop = cuts.pop(0) if cuts else None
            found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if not found or not hub.ranges:
                self.answer(data, 200, {"ETag": f'"{git_hash(data)}"'}, stop)
                return
            begin = int(found[1])
            if begin >= len(data):
                self.answer(b"", 416)
                return
            self.answer(data[begin:], 206, {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"}, stop)

        # -- ModelScope

        def ms_allowed(self, model: str, query: dict[str, list[str]]) -> bool:
            if hub.token and f"m_session_id={hub.token}" not in self.headers.get("Cookie", ""):
                self.json({"Code": 10010205002, "Message": "no permission", "Success": False}, 403)
            elif model != hub.model or query.get("Revision") not in (["master"], ["v1"]):
                self.json({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
            else:
                return True
            return False

        def ms_listing(self, model: str, query: dict[str, list[str]]) -> None:
            if not self.ms_allowed(model, query):
                return
            files: list[dict[str, object]] = [{"Path": "assets", "Name": "assets", "Type": "tree", "Size": 0, "Sha256": ""}]
            for name, data in hub.files.items():
                digest = hashlib.sha256(data).hexdigest()
                files.append({"Path": name, "Name": name, "Type": "blob", "Size": len(data), "Sha256": digest})
            self.json({"Code": 200, "Data": {"Files": files}, "Message": "success", "Success": True})

    return Handler
