"""``pytest tests/parity --golden-dir DIR`` checks any directory of reference outputs of the same form."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity.checks import collect

GOLDEN = Path(__file__).parents[1] / "golden" / "keye_vl"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", type=Path, default=GOLDEN, help="directory of reference outputs to check")


def golden_dir(config: pytest.Config) -> Path:
    return config.getoption("golden_dir", GOLDEN)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "check" in metafunc.fixturenames:
        found = collect(golden_dir(metafunc.config))
        metafunc.parametrize("check", found.values(), ids=list(found))
