"""The comparisons in ``benchmarks/`` still run: each once at tiny sizes in a process of its own, without a peer."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
import time
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


class Inside:
    """``harness.Worker`` without a process, which takes longer to begin than these comparisons do; what is asked and told is
    JSON all the same."""

    def __init__(self, name: str, script: str, *, threads: int) -> None:
        assert (name, script, threads) == ("mirada", "ours.py", 1)
        self.name, self.cpu = name, 0.0
        self._side = importlib.import_module("ours").Side()

    def ask(self, do: str, **given):
        value = getattr(self._side, do)(**json.loads(json.dumps(given)))
        self.cpu = time.process_time()
        return json.loads(json.dumps(value))

    def close(self) -> None:
        self._side.vlm.close()


@pytest.fixture
def comparison(monkeypatch, made):
    """Name -> its module, with workers in this process."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)

    def get(name: str):
        make = importlib.import_module("shapes").make  # what each would start a process for
        make(made / "picture-tiny-2-2", "tiny", "tiny", 2, 2)
        make(made / "throughput-tiny", "tiny", "tiny", None, None)
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "Worker", Inside)
        if hasattr(module, "cpu_image"):
            monkeypatch.setattr(module.cpu_image, "Worker", Inside)
        return module

    yield get
    for name in [name for name in sys.modules if name not in before and (FOLDER / f"{name}.py").exists()]:
        del sys.modules[name]


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("harness")
    sys.modules.pop("harness")


def written(file: Path, names: list[str]) -> list[dict]:
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == names
    assert all(row["ratio"] > 0 for row in rows if "ratio" in row)
    return rows


def test_a_comparison_runs_in_processes(tmp_path, made):
    run("cpu_decode", "--threads", "1", "--folder", str(made), "--json", str(tmp_path / "rows.json"))
    names = ["tiny fp32 : itself fp32 decode", "tiny fp32 : itself fp32 prefill", "tiny fp32 : itself fp32 error"]
    error = written(tmp_path / "rows.json", names)[-1]
    assert error["kl"] == 0 and error["same"] == 1 and error["steps"] < 1e-4


LATENCIES = [f"{name}: {what}" for name in ("mini", "Qwen2-VL's widths") for what in ("alone", "112x112", "300 tokens")]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("cpu_image", ["first token, 112x112", "ten questions, 2 token(s) each", "ten at once, 2 token(s) each"]),
        ("mixed_latency", LATENCIES),
        ("throughput", ["mini : one by one", "same sizes : itself, one by one"]),
    ],
)
def test_a_comparison_runs(comparison, tmp_path, made, name, rows):
    words = ["--smoke", "--threads", "1", "--folder", str(made), "--json", str(tmp_path / "rows.json")]
    assert comparison(name).main(words) == 0
    written(tmp_path / "rows.json", rows)


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
