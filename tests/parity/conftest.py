"""``pytest tests/parity --golden-dir DIR`` checks any directory of reference outputs of the same form."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity.checks import collect

GOLDEN = Path(__file__).parents[1] / "golden"
KEYE, KIMI, QWEN2_VL = (GOLDEN / name for name in ("keye_vl", "kimi_vl", "qwen2_vl"))
SHIPPED = (KEYE, KIMI, QWEN2_VL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", type=Path, default=None, help="directory of reference outputs to check")


def golden_dirs(config: pytest.Config) -> tuple[Path, ...]:
    """The directory that was asked for, or those beside the tests."""
    asked = config.getoption("golden_dir", None)
    return SHIPPED if asked is None else (asked,)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "check" in metafunc.fixturenames:
        folders = golden_dirs(metafunc.config)
        found = {f"{folder.name}/{name}": check for folder in folders for name, check in collect(folder).items()}
        metafunc.parametrize("check", found.values(), ids=list(found))
