"""``benchmarks/gpu_parity.py`` on a CPU with small widths: every row is there, and a fault turns its verdict."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from mirada.layers import kinds

FILE = Path(__file__).parents[1] / "benchmarks" / "gpu_parity.py"
TINY = ["--device", "cpu", "--tiny", "--tokens", "80"]


@pytest.fixture(scope="module")
def parity():
    spec = importlib.util.spec_from_file_location("gpu_parity", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_parity"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_parity"]


def lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.endswith((" ok", "TOO LARGE"))]


def test_every_model_and_row(parity, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert parity.main(TINY) == 0
    found = lines(capsys)
    assert len(found) == 15 and all(line.endswith(" ok") for line in found)
    for model in ("Qwen2-VL-7B", "Keye-VL-8B", "Kimi-VL-A3B"):
        kinds = [" ".join(line.split()[1:3]) for line in found if line.startswith(model)]
        assert kinds == ["narrow features", "narrow logits", "cached logits", "eager features", "eager logits"]


def test_a_wrong_kernel_is_noticed(parity, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(kinds.KINDS, "eager", lambda q, k, v, causal, scale: kinds.sdpa(q, k, v, causal, 2 * scale))
    assert parity.main([*TINY, "--only", "keye"]) == 1
    bad = [line for line in lines(capsys) if line.endswith("TOO LARGE")]
    assert bad and all(" eager " in line for line in bad)


def test_differences_and_what_is_left_out(parity):
    theirs = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    row = parity.compare("m", "w", theirs + torch.tensor([[0.0], [3.0]]), theirs, (1.0, 1.0), torch.tensor([True, False]))
    assert row.largest == row.mean == 0 and row.left_out == 0.5 and not row.good
    row = parity.compare("m", "w", theirs + 0.5, theirs, (1.0, 1.0))
    assert row.good and abs(row.largest - 0.5 / float(theirs.std())) < 1e-6
    assert not parity.compare("m", "w", theirs * torch.nan, theirs, (1.0, 1.0)).good


@pytest.mark.reference
@pytest.mark.parametrize("model", ["qwen2", "kimi"])
def test_beside_transformers(parity, capsys, model):
    pytest.importorskip("transformers")
    assert parity.main([*TINY, "--only", model]) == 0
    (peer,) = [line for line in lines(capsys) if " peer logits " in line]
    assert float(peer.split()[3]) < 1e-4


@pytest.mark.gpu
def test_real_widths_on_a_gpu(parity):
    assert parity.main([]) == 0
