"""Settings: what is accepted, and what each refusal says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirada import config
from mirada.errors import SettingsError


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["cosine", "linear"] = "cosine"


@dataclass(frozen=True)
class Settings:
    steps: int
    optim: Optim = field(default_factory=Optim)
    name: str = "run"
    out: Path = Path("runs")
    clip: float | None = None
    resume: bool = False
    sizes: tuple[int, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    extra: Any = None
    warm: int | float = 0
    stages: list[Optim] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("steps must be at least 1")


def test_values_of_every_kind_become_what_the_field_says():
    made = config.parse(
        Settings,
        {
            "steps": 3,
            "optim": {"lr": 1, "betas": [0.5, 1], "schedule": "linear"},
            "out": "a/b",
            "clip": None,
            "resume": True,
            "sizes": [1, 2],
            "weights": {"a": 1},
            "extra": {"any": "thing"},
            "warm": 2,
            "stages": [{"lr": 2.0}],
        },
    )
    assert made == Settings(
        3,
        Optim(1.0, (0.5, 1.0), "linear"),
        out=Path("a/b"),
        resume=True,
        sizes=(1, 2),
        weights={"a": 1.0},
        extra={"any": "thing"},
        warm=2,
        stages=[Optim(2.0)],
    )
    assert isinstance(made.optim.lr, float) and isinstance(made.warm, int)


BAD = [
    ({"steps": 3, "optm": {}}, "settings has the unknown key 'optm'", "did you mean 'optim'"),
    ({"steps": 3, "optim": {"lrr": 1}}, "settings.optim has the unknown key 'lrr'", "did you mean 'lr'"),
    ({}, "settings lacks 'steps'", "a whole number"),
    ({"steps": "3"}, "settings.steps is '3' (str)", "a whole number"),
    ({"steps": True}, "settings.steps is True (bool)", "a whole number"),
    ({"steps": 3.0}, "settings.steps is 3.0 (float)", "a whole number"),
    ({"steps": 3, "clip": "no"}, "settings.clip is 'no'", "a number or null"),
    ({"steps": 3, "clip": True}, "settings.clip is True", "a number or null"),
    ({"steps": 3, "resume": 1}, "settings.resume is 1", "true or false"),
    ({"steps": 3, "name": 7}, "settings.name is 7", "text"),
    ({"steps": 3, "out": 7}, "settings.out is 7", "a path"),
    ({"steps": 3, "sizes": 1}, "settings.sizes is 1", "a list"),
    ({"steps": 3, "sizes": [1, "x"]}, "settings.sizes[1] is 'x'", "a whole number"),
    ({"steps": 3, "optim": 3}, "settings.optim is a int", "a mapping"),
    ({"steps": 3, "optim": {"betas": [1.0]}}, "settings.optim.betas has 1 values", "give 2"),
    ({"steps": 3, "optim": {"schedule": "step"}}, "settings.optim.schedule is 'step'", "one of 'cosine', 'linear'"),
    ({"steps": 3, "weights": {"a": "b"}}, "settings.weights.a is 'b'", "a number"),
    ({"steps": 3, "weights": []}, "settings.weights is []", "a mapping"),
    ({"steps": 3, "stages": [{"lrr": 1}]}, "settings.stages[0] has the unknown key 'lrr'", "did you mean 'lr'"),
    ({"steps": 0}, "settings is not valid: steps must be at least 1", "correct the value"),
    ([], "settings is a list", "a mapping"),
]


@pytest.mark.parametrize(("mapping", "problem", "fix"), BAD, ids=[row[1] for row in BAD])
def test_a_refusal_names_the_place_and_the_fix(mapping, problem, fix):
    with pytest.raises(SettingsError) as caught:
        config.parse(Settings, mapping)
    assert problem in caught.value.problem
    assert fix in caught.value.fix


def test_yaml_then_overrides(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("steps: 5\noptim:\n  lr: 1e-4\nname: off\nclip: ~\nsizes: [0x10, 2]\n")
    made = config.load(Settings, path, ["--optim.lr=3e-5", "name=7", "--clip=1", "optim.betas=[0.1, 0.2]"])
    assert made == Settings(5, Optim(3e-5, (0.1, 0.2)), name="7", clip=1.0, sizes=(16, 2))
    assert config.load(Settings, path).optim.lr == 1e-4
    assert config.load(Settings, path).name == "off"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("--steps", "'--steps'"),
        ("--optim.=3", "'--optim.=3'"),
        ("--steps.x=3", "settings.steps is no group"),
        ("--steps=x", "settings.steps is 'x'"),
        ("--stps=3", "unknown key 'stps'"),
        ("--optim=3", "settings.optim is 3"),
        ("--resume=yes", "settings.resume is 'yes'"),
        ("--sizes=[1", "settings.sizes is '[1'"),
    ],
)
def test_bad_overrides(override, problem):
    with pytest.raises(SettingsError) as caught:
        config.load(Settings, overrides=["--steps=1", override])
    assert problem in caught.value.problem


def test_dashes_in_an_override_are_underscores():
    @dataclass(frozen=True)
    class Local:
        max_tokens: int = 1

    globals()["Local"] = Local
    assert config.load(Local, overrides=["--max-tokens=7"]).max_tokens == 7


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("steps: 1\nsteps: 2\n", "given twice"),
        ("- 1\n", "holds a list"),
        ("a: [1\n", "not valid yaml"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid yaml"),
        ("a: " + "9" * 5000, "not valid yaml"),
        ("a: " + "[" * 1200 + "]" * 1200, "nested too deeply"),
        ("? [1]\n: 2\n", "is no name"),
        ("{a: 1}: 2\n", "is no name"),
    ],
)
def test_bad_files(tmp_path, text, problem):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        config.load(Settings, path)
    assert problem in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_and_an_empty_one(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read"):
        config.load(Settings, tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert config.load(Optim, tmp_path / "empty.yaml") == Optim()


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_survives_the_command_line(number):
    assert config.load(Optim, overrides=[f"lr={number!r}"]).lr == number


def _fresh(code: str, **env: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": "/usr/bin", **env}
    ).stdout.strip()


def test_openmp_waits_passively_unless_the_user_chose():
    show = "import mirada, os; from mirada import config; print(os.environ['OMP_WAIT_POLICY'], config.WAIT_POLICY_CHOSEN)"
    assert _fresh(show) == "PASSIVE False"
    assert _fresh(show, OMP_WAIT_POLICY="ACTIVE") == "ACTIVE True"


def test_a_torch_that_came_first_is_noticed():
    show = "import sys; sys.modules['torch'] = object(); from mirada import config; print(config.TORCH_CAME_FIRST)"
    assert _fresh(show) == "True"
    assert _fresh("from mirada import config; print(config.TORCH_CAME_FIRST)") == "False"


def test_env_reads_the_environment(monkeypatch):
    monkeypatch.setenv("MIRADA_TEST", "x")
    assert config.env("MIRADA_TEST") == "x"
    monkeypatch.delenv("MIRADA_TEST")
    assert config.env("MIRADA_TEST") is None and config.env("MIRADA_TEST", "y") == "y"
