"""Our outputs beside those of the reference, one test per recorded fact."""

from __future__ import annotations

from parity.checks import collect
from parity.conftest import golden_dirs


def test_recorded(check) -> None:
    check()


def test_there_is_something_to_check(pytestconfig) -> None:
    for directory in golden_dirs(pytestconfig):
        assert collect(directory), f"{directory} holds nothing that could be checked"
