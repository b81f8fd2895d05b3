"""``mirada doctor``: what it finds, and that each thing it can find is found."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from mirada import config
from mirada.cli import doctor


@pytest.fixture(scope="module")
def report():
    return doctor.examine()[0]


def test_sections_and_what_is_installed(report):
    import av
    import torch

    assert list(report) == ["versions", "devices", "decoders", "threads", "memory", "models", "extras"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["decoders"]["pyav"] == av.__version__ and "h264" in report["decoders"]["video"]
    assert {"jpg", "zlib", "webp"} <= set(report["decoders"]["pictures"])
    assert report["threads"]["torch"] == torch.get_num_threads() and report["threads"]["OMP_WAIT_POLICY"]
    assert 0 < report["memory"]["available"] <= report["memory"]["total"]
    assert re.match(r"\d+ cores", report["devices"]["cpu"])


def test_every_requirement_is_looked_at(report):
    project = tomllib.loads((Path(doctor.__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}  # type: ignore[index]
    assert names <= set(report["versions"])
    assert set(report["extras"]) == set(project["optional-dependencies"])


def test_what_is_installed_is_found():
    for name, _ in doctor._requirements():
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        assert doctor._present(name), name


def test_json_and_the_table_say_the_same(mirada):
    made = json.loads(mirada("doctor", "--json").out)
    table = mirada("doctor")
    broken = any(problem["level"] == "error" for problem in made["problems"])
    assert table.code == int(broken)
    assert made["versions"]["torch"] in table.out and ("All that asking needs is there." in table.out) == (not broken)
    assert "[hub]" not in table.out.split("extras")[0]


def problems(check) -> list[doctor.Problem]:
    found: list[doctor.Problem] = []
    check(found)
    return found


def test_a_missing_package_and_a_missing_extra_with_the_command_that_helps(monkeypatch, mirada):
    real = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name in ("yaml", "playwright") else real(name))
    (yaml,) = problems(doctor._versions)
    assert (yaml.level, yaml.problem, yaml.fix) == ("error", "the package pyyaml is missing", "pip install pyyaml")
    notes = {problem.problem: problem.fix for problem in problems(doctor._extras)}
    assert notes["the extra [agent] lacks playwright"] == "pip install 'mirada[agent]'"
    done = mirada("doctor")
    assert done.code == 1 and "the package pyyaml is missing" in done.out
    assert "pip install 'mirada[agent]'" in " ".join(done.out.split())


def test_torch_absent_is_reported_not_raised(monkeypatch):
    real = doctor.find_spec
    gone = ("torch", "av", "PIL")
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name in gone else real(name))
    _, found = doctor.examine()
    said = {problem.problem for problem in found}
    assert {"the package torch is missing", "the package av is missing", "the package pillow is missing"} <= said


def test_a_wait_policy_that_came_too_late(monkeypatch):
    monkeypatch.setattr(config, "TORCH_CAME_FIRST", True)
    monkeypatch.setattr(config, "WAIT_POLICY_CHOSEN", False)
    (late,) = [p for p in problems(doctor._threads) if "too late" in p.problem]
    assert "import mirada before torch" in late.fix
    monkeypatch.setattr(config, "WAIT_POLICY_CHOSEN", True)
    assert not [p for p in problems(doctor._threads) if "too late" in p.problem]
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setattr(config, "TORCH_CAME_FIRST", False)
    assert [p for p in problems(doctor._threads) if "ACTIVE" in p.problem]


def test_more_threads_than_cores(monkeypatch):
    monkeypatch.setattr(doctor, "_cores", lambda: 0)
    assert any("OMP_NUM_THREADS=0" in p.fix for p in problems(doctor._threads))


def test_codecs_and_formats_that_are_missing(monkeypatch):
    import av
    from PIL import features

    monkeypatch.setattr(av, "codecs_available", {"h264"})
    monkeypatch.setattr(features, "check", lambda name: name != "webp")
    video, pictures = problems(doctor._decoders)
    assert "hevc" in video.problem and "h264" not in video.problem and "av" in video.fix
    assert pictures.problem == "Pillow lacks webp"


def test_the_model_inside_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "cli" / "doctor.py"))
    (gone,) = problems(doctor._models)
    assert gone.level == "error" and "mini" in gone.problem and gone.fix.endswith("--no-deps .")
    mini = tmp_path / "assets" / "mini"
    mini.mkdir(parents=True)
    (mini / "config.json").write_text("{}")
    (mini / "model-1.safetensors").write_bytes(b"x" * 2_000_000)
    assert problems(doctor._models) == []
    assert doctor._models([])["mini"].startswith("2.0 MB")


def test_an_nvidia_driver_with_a_cpu_torch(monkeypatch):
    import torch

    monkeypatch.setattr(doctor, "_DRIVER", Path("/proc/version"))
    monkeypatch.setattr(torch.version, "cuda", None)
    (found,) = problems(doctor._devices)
    assert "built for the CPU" in found.problem and "download.pytorch.org" in found.fix


def test_doctor_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "mirada.cli", "doctor", "--json"], capture_output=True, text=True, check=False)
    assert done.stderr == "" and json.loads(done.stdout)["threads"]["OMP_WAIT_POLICY"]


def test_which_kernels_multiply(monkeypatch):
    from mirada.layers.kernels import library

    monkeypatch.setattr(library, "status", lambda: library.Status("avx2", "the best that this processor has"))
    found: list[doctor.Problem] = []
    assert doctor._kernels(found) == "compiled, avx2 (the best that this processor has)" and not found
    monkeypatch.setattr(library, "status", lambda: library.Status("none", "they were not compiled", "pip install"))
    assert "fbgemm" in doctor._kernels(found)
    assert found[0].level == "warning" and "they were not compiled" in found[0].problem and found[0].fix == "pip install"
    monkeypatch.setattr(library, "_file", lambda suffix: Path("nowhere"))
    assert library._loaded.__wrapped__()[1].fix.endswith("on the path, " + library.AGAIN)
