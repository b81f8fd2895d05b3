"""The comparisons in ``benchmarks/`` still run: each once at tiny sizes in a process of its own, without a peer."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(name: str, *arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--smoke", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where checkpoints are made: those that two comparisons want are made once."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("harness")
    sys.modules.pop("harness")


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("cpu_decode", ["tiny fp32 : itself fp32 decode", "tiny fp32 : itself fp32 prefill", "tiny fp32 : itself fp32 error"]),
        ("cpu_image", ["first token, 112x112", "ten questions, 2 token(s) each"]),
        (
            "mixed_latency",
            [
                "mini: alone",
                "mini: 112x112",
                "mini: 300 tokens",
                "Qwen2-VL's widths: alone",
                "Qwen2-VL's widths: 112x112",
                "Qwen2-VL's widths: 300 tokens",
            ],
        ),
        ("throughput", ["mini : one by one", "same sizes : itself, one by one"]),
    ],
)
def test_a_comparison_runs(tmp_path, made, name, rows):
    run(name, "--threads", "1", "--folder", str(made), "--json", str(tmp_path / "rows.json"))
    written = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["name"] for row in written] == rows
    assert all(row["ratio"] > 0 for row in written if "ratio" in row)
    for row in written:
        if row["name"].endswith("error"):
            assert row["kl"] == 0 and row["same"] == 1 and row["steps"] < 1e-4


def test_speculation_runs(tmp_path, made):
    said = run("speculate", "--threads", "1", "--folder", str(made), "--json", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    names = ["mini, reads again", "mini, goes round", "tiny fp32, 100% of drafts right", "tiny fp32, 0% of drafts right"]
    assert [row["name"] for row in rows] == names and "a step of 1, 2, 4, 8 rows" in said
    assert all(row["ratio"] > 0 and row["always"] > 0 for row in rows)


def test_the_soak_runs(tmp_path):
    said = run("soak", "--csv", str(tmp_path / "soak.csv"))
    assert "LOST" not in said and "prefix cache" in said
    with (tmp_path / "soak.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["ended"]) > 0 and int(rows[-1]["pending"]) == 0 and float(rows[-1]["rss_mb"]) > 50


def test_a_lost_request_and_growth_are_noticed(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    soak = importlib.import_module("soak")
    from mirada import MediaError, Output

    tally = soak.Tally()
    first, second, third, fourth = (tally.began("text") for _ in range(4))
    tally.done(first, Output(finish="length"), soak.WHOLE)
    assert not tally.faults
    tally.done(second, Output(finish="error", error=MediaError("x", "y")), soak.WHOLE)  # good input failed
    tally.done(third, Output(finish="stop"), ("error",))  # bad input did not
    assert len(tally.faults) == 2 and not tally.overdue(60) and len(tally.overdue(-1)) == 1
    tally.done(fourth, Output(finish="error"), ("error",))  # an error that is none
    assert len(tally.faults) == 3


def test_memory_that_is_not_flat_is_noticed(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    soak = importlib.import_module("soak")
    noise = np.random.default_rng(3).uniform(-20, 20, 900)

    def memory(grown):
        """What is said of 15 minutes, a row a second: 500 MB, ``grown(minutes)`` more, and holes that come and go."""
        rows = [{"seconds": float(i), "rss_mb": 499.0 + grown(i / 60) + noise[i], "children_mb": 1.0}
                for i in range(900)]  # fmt: skip
        return soak.Memory.of(rows)

    flat = memory(lambda minutes: 80 * min(minutes / 2, 1))  # what a warm-up fills
    assert not flat.faults and abs(flat.slope) < 0.5 and flat.minutes == pytest.approx(7.5, abs=0.1)
    assert not memory(lambda minutes: 300 * (9 < minutes < 10)).faults  # a burst
    (slow,) = memory(lambda minutes: 3 * minutes).faults  # 7 % after the warm-up
    assert "second half by 2" in slow
    assert "after the warm-up" in memory(lambda minutes: 60 * (minutes > 13)).faults[0]
    assert len(memory(lambda minutes: 10 * minutes).faults) == 2
    assert soak.slope([0, 1, 2, 3], [1, 3, 5, 7]) == 2.0 and soak.slope([1, 1], [1, 2]) == 0.0


def test_ratios_verdicts_and_a_noisy_machine(harness, capsys):
    turns = harness.Turns([(1.0, 2.0), (1.0, 3.0), (2.0, 2.0)], [0.0, 1.0, 30.0])
    assert turns.ratio(float) == 2.0 and turns.spread(float) == (1.0, 3.0) and turns.side(0, float) == 1.0
    options = harness.argparse.Namespace(smoke=False, anyway=False, json=None, pairs=7, threads=1)
    report = harness.Report(options, 0.0)
    assert report.add("a", turns, 2.0, 1.5) == ">= 1.5" and report.finish() == 0
    assert report.add("b", turns, 1.4, 1.5) == "BELOW 1.5" and report.finish() == 1
    report.add("c", harness.Turns([(1.0, 2.0)], [80.0]), 2.0, 1.5)
    assert report.finish() == 2 and "not to be quoted" in capsys.readouterr().out


def test_a_busy_machine_is_refused(harness, monkeypatch):
    monkeypatch.setattr(harness, "waiting", lambda: 60.0)
    with pytest.raises(SystemExit, match="busy"):
        harness.require_quiet(False)
    assert harness.require_quiet(True) == 60.0


def test_distance_of_distributions(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    decode = importlib.import_module("cpu_decode")
    right = decode.log_softmax(np.log(np.array([[0.5, 0.5], [0.9, 0.1]])))
    made = decode.log_softmax(np.log(np.array([[0.25, 0.75], [0.9, 0.1]])))
    kl, same = decode.distance(right, made)
    assert kl == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)) / 2) and same == 0.5
    assert decode.distance(right, right) == (0.0, 1.0)
    layers = decode.shapes.weights("mini") - 256 * 1024
    assert decode.read("mini", "int4") == layers * (0.5 + 2 / 32) + 256 * 1024 * (1 + 2 / 128)
