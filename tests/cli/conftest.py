"""A tiny checkpoint, a picture, a video, and the command run in this process."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image
from tiny import make_tiny_keye

from mirada.cli import commands as cli


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_tiny_keye(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (90, 60), (200, 10, 10)).save(path)
    return path


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "clip.gif"
    frames = [Image.fromarray(np.full((60, 90, 3), 40 * n, np.uint8)) for n in range(6)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=250)
    path = path.rename(tmp_path / "clip.bin")
    return path


@pytest.fixture
def mirada(monkeypatch, capsys):
    """``mirada("ask", ...) -> Done``."""

    def run(*words: object) -> Done:
        monkeypatch.setattr(cli, "_debug", False)
        monkeypatch.setattr(sys, "argv", ["mirada", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run
