"""Where a run's figures go: one JSON line per report, TensorBoard, and a progress bar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunLog:
    """``report(step, figures)`` appends to ``log.jsonl`` and to TensorBoard, and shows them beside the bar."""

    def __init__(self, directory: Path, steps: int, start: int = 0, tensorboard: bool = True, quiet: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.file = (directory / "log.jsonl").open("a")
        self.writer = _writer(directory) if tensorboard else None
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[figures]}"), disable=quiet)
        self.bar = self.progress.add_task(directory.name, total=steps, completed=start, figures="")

    def __enter__(self) -> RunLog:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        self.file.close()
        if self.writer is not None:
            self.writer.close()

    def advance(self, step: int) -> None:
        self.progress.update(self.bar, completed=step)

    def report(self, step: int, figures: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in figures.items()}}) + "\n")
        self.file.flush()
        if self.writer is not None:
            for name, value in figures.items():
                self.writer.add_scalar(name, value, step)
        shown = " ".join(f"{name}={value:.4g}" for name, value in figures.items())
        self.progress.update(self.bar, completed=step, figures=shown)


def _writer(directory: Path):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory / "tensorboard"))
