"""The Triton kernels in Triton's interpreter: ``triton_cases.py`` and ``triton_model.py``, in one process of their own."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = ("triton_cases.py", "triton_model.py")

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def cases() -> list[str]:
    """Names of all test functions of the files."""
    trees = [ast.parse((HERE / name).read_text()) for name in FILES]
    return [node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_"]


@pytest.fixture(scope="module")
def report() -> str:
    """What pytest prints of the process."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        *(str(HERE / x) for x in FILES),
    ]
    env = os.environ | {"TRITON_INTERPRET": "1", "MIRADA_GPU_KERNELS": "interpret"}
    return subprocess.run(command, cwd=HERE.parent.parent, env=env, capture_output=True, text=True, timeout=300).stdout


@pytest.mark.parametrize("name", cases())
def test_kernel(report, name):
    found = re.findall(rf"^(PASSED|FAILED|ERROR) \S+::{name}(?:\[|\s|$)", report, re.MULTILINE)
    assert found and set(found) == {"PASSED"}, report[-6000:]
