"""The measurements for a GPU, at tiny sizes on the CPU: they run, write their rows, and say when there is no GPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
ROWS = {
    "gpu_kernels": "kernels",
    "gpu_decode": "Kimi-VL-A3B int4: decode, graph",
    "gpu_prefill": "Qwen2-VL-7B: vision, 2 pictures",
    "gpu_throughput": "ours, text alone",
}


@pytest.fixture
def measurement(monkeypatch):
    """Name -> its module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in [name for name in sys.modules if name not in before and (FOLDER / f"{name}.py").exists()]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ROWS)
def test_a_measurement_runs(name, measurement, tmp_path):
    more = ["--quant", "int4"] if name == "gpu_decode" else []
    assert measurement(name).main(["--smoke", "--json", str(tmp_path), *more]) == 0
    made = json.loads((tmp_path / f"{name}.json").read_text())
    rows = {row["what"]: row for row in made["rows"]}
    assert ROWS[name] in rows and not any("error" in row or row["good"] is False for row in made["rows"])
    if name == "gpu_decode":
        assert sum(what.endswith("captured against launched") and row["good"] for what, row in rows.items()) == 6
        assert sum(what.endswith("decode, submit") for what in rows) == 3
        # Rounded matrices are fewer bytes: 4 bits beside 32, with scales, and what is not rounded.
        sizes = [rows[f"Keye-VL-8B{quant}: decode, graph"]["gigabytes"] for quant in ("", " int4")]
        assert sizes[1] < 0.4 * sizes[0]


@pytest.mark.parametrize("answered", (4, 3))
def test_the_peer_that_batches_continuously(answered, measurement, tmp_path, monkeypatch):
    """With a stand-in for transformers: what it is asked for, and that short answers are no rate."""
    asked, rows = [], {}

    class Model:
        def __getattr__(self, name):
            return lambda *args, **options: self

        def generate_batch(self, inputs, generation_config):
            asked.append((inputs, generation_config))
            return {i: SimpleNamespace(generated_tokens=[1] * answered) for i in range(len(inputs))}

    fake = SimpleNamespace(
        Qwen2Config=SimpleNamespace, Qwen2ForCausalLM=lambda config: Model(), GenerationConfig=SimpleNamespace
    )
    monkeypatch.setitem(sys.modules, "transformers", fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "config.json").write_text(json.dumps({"hidden_size": 8, "vocab_size": 100}))
    options, report = (
        SimpleNamespace(requests=3, new=4, goal=0.0),
        SimpleNamespace(row=lambda what, *a, **v: rows.update({what: v})),
    )
    measurement("gpu_throughput").peer_of_text(tmp_path, options, report, 1e9)
    inputs, how = asked[0]
    assert len(inputs) == 3 and all(200 <= len(one) < 400 for one in inputs) and how.max_new_tokens == 4
    assert ("error" in rows["transformers, continuous batching, text alone"]) == (answered == 3)
    assert ("ours over transformers' continuous batching" in rows) == (answered == 4)


def test_without_a_gpu_it_says_so(measurement):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="no CUDA device"):
        measurement("gpu_decode").main([])


def test_the_one_command_runs_each_and_fails_where_there_is_no_gpu(tmp_path):
    """Without CUDA every part refuses, so the command fails, and has tried all of them."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: run the command itself")
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "no CUDA device $*"\nexit 3\n')
    fake.chmod(0o755)
    command = ["sh", str(FOLDER / "gpu_all.sh"), str(tmp_path / "out"), str(fake)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    for name in (*ROWS, "gpu_parity"):
        assert f"== {name}: exit 3" in done.stdout and (tmp_path / "out" / f"{name}.log").exists()
    limits = [int(line.split()[1]) for line in (FOLDER / "gpu_all.sh").read_text().splitlines() if line.startswith("measure ")]
    assert len(limits) == 5 and sum(limits) <= 540
