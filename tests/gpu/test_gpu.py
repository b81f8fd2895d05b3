"""On a card: the kernels compiled, and answers of a tiny model against those of the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_tiny

from mirada import VLM
from mirada.types import Message, Sampling, Text

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_kernels_compiled():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "tests/layers/triton_cases.py"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("kind", ["qwen2_vl", "KeyeVL1_5", "kimi_vl"])
def test_answers_are_those_of_the_cpu(kind, tmp_path):
    """In float32, through pages, kernels and captured steps. Random models have near ties: seven of eight tokens must agree."""
    directory, sampling = make_tiny(tmp_path / kind, kind, seed=7), Sampling(max_tokens=8, ignore_eos=True)
    chats = [[Message("user", (Text(text),))] for text in ("One.", "A longer question, with more words in it. " * 5)]
    replies = {}
    for device in ("cpu", "cuda"):
        with VLM(directory, device=device, dtype="float32") as vlm:
            outputs = [vlm.submit(chat, sampling) for chat in chats]
            replies[device] = [output.result().tokens for output in outputs]
            graphs = vlm._engine.engine.runner.graphs
            assert (graphs is not None and graphs.num_replayed > 0) == (device == "cuda")
    for ours, theirs in zip(replies["cuda"], replies["cpu"], strict=True):
        assert len(ours) == 8 and ours[0] == theirs[0] and sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 7
