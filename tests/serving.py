"""A server in a process of its own, and what clients send it."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from oracle import problems
from PIL import Image

KEY = "sk-of-the-tests"
PLANTED = "a defect of the tests:"
"""How what ``server.py`` raises on purpose begins."""


@dataclass
class Running:
    """A server under test."""

    process: subprocess.Popen
    url: str
    folder: Path
    log: Path
    judged: int = 0
    """Bytes of the answers on record that were judged."""

    def judge(self) -> None:
        """AssertionError for answers since the last time that OpenAI's document does not allow."""
        found, self.judged = problems(self.folder / "answers.jsonl", self.judged)
        assert not found, "\n".join(found[:20])

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)

    def stats(self, model: str = "echo") -> dict[str, float]:
        """The engine's counts, from /metrics."""
        lines = (line for line in self.get("/metrics").text.splitlines() if line.startswith("mirada_engine_"))
        pairs = (line.rpartition(" ") for line in lines if f'model="{model}"' in line)
        return {name.partition("{")[0].removeprefix("mirada_engine_"): float(value) for name, _, value in pairs}

    def logged(self) -> list[dict]:
        whole = self.log.read_text().rpartition("\n")[0]  # the line after it may still be under way
        return [json.loads(line) for line in whole.splitlines()]


@contextmanager
def start(folder: Path, *words: str, log: str = "log.txt"):
    """``server.py`` in a process, ended at the end."""
    path = folder / log if "/" not in log else Path(log)
    with path.open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", Path(__file__).parent / "serve" / "server.py", folder, *words],
            stdout=subprocess.PIPE, stderr=err, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        )  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), path.read_text()
        running = Running(process, url, folder, path)
        yield running
        running.judge()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


@contextmanager
def start_command(folder: Path, config: dict, *words: str):
    """``mirada serve`` as people type it, with ``config`` in a file: (process, address, its log). Ended at the end."""
    file, log = folder / "serve.yaml", folder / "log.txt"
    file.write_text(json.dumps(config))  # JSON is yaml
    command = [sys.executable, "-W", "error", "-m", "mirada.cli", "serve", "--port", "0", "--config", str(file), *words]
    with log.open("w") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True)
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert " at http" in first, log.read_text()
        yield process, first.split(" at ")[1].split()[0], log
    finally:
        process.kill()
        process.communicate()


def png(size=(90, 60), color=(200, 10, 10)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def gif(frames=6) -> bytes:
    out = io.BytesIO()
    images = [Image.fromarray(np.full((60, 90, 3), 40 * n, np.uint8)) for n in range(frames)]
    images[0].save(out, "GIF", save_all=True, append_images=images[1:], duration=250)
    return out.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def uncached(usage) -> dict:
    """``usage`` without what depends on who asked before."""
    made = usage.model_dump()
    (made.get("prompt_tokens_details") or made["input_tokens_details"]).pop("cached_tokens")
    return made


def user(text, *parts) -> list[Any]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]


def image(url):
    return {"type": "image_url", "image_url": {"url": url}}
