"""Planting mistakes: a function that breaks something, beside the parity check that must notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from parity import golden
from parity.checks import collect
from parity.conftest import KEYE

Plant = Callable[[pytest.MonkeyPatch], None]


class Mistakes(dict[str, tuple[str, Plant, float]]):
    """Name of a mistake -> (check, plant, tolerance), for the checks of one directory."""

    def __init__(self, directory: Path = KEYE) -> None:
        super().__init__()
        self.directory = directory

    def caught_by(self, check: str, atol: float = golden.ATOL) -> Callable[[Plant], Plant]:
        """Registers a mistake beside the check that must notice it."""

        def register(plant: Plant) -> Plant:
            self[plant.__name__] = (check, plant, atol)
            return plant

        return register

    def prove(self, name: str, patch: pytest.MonkeyPatch) -> None:
        """The check passes, the mistake is planted, the check fails on a difference."""
        check, plant, atol = self[name]
        patch.setattr(golden, "ATOL", atol)
        collect(self.directory)[check]()
        plant(patch)
        with pytest.raises(AssertionError, match=r"differs?\b|the reference has"):
            collect(self.directory)[check]()
