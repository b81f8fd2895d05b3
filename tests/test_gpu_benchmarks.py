"""The measurements for a GPU, at tiny sizes on the CPU: they run, write their rows, and say when there is no GPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
ROWS = {
    "gpu_kernels": "kernels",
    "gpu_decode": "Kimi-VL-A3B: decode, graph",
    "gpu_prefill": "Qwen2-VL-7B: vision, 2 pictures",
    "gpu_throughput": "ours",
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
    assert measurement(name).main(["--smoke", "--json", str(tmp_path)]) == 0
    made = json.loads((tmp_path / f"{name}.json").read_text())
    rows = {row["what"]: row for row in made["rows"]}
    assert ROWS[name] in rows and not any("error" in row or row["good"] is False for row in made["rows"])
    if name == "gpu_decode":
        assert sum(what.endswith("captured against launched") and row["good"] for what, row in rows.items()) == 3


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
