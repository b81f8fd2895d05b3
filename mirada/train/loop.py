"""The training loop: one page, one device (the model's).

``train(model, objective, batches, settings, directory)`` draws batch ``k`` for step ``k``, so that a run stopped at any
step and resumed sees exactly what an unbroken run would have seen.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from mirada.errors import CheckpointError
from mirada.train import checkpoint
from mirada.train.batch import TrainBatch
from mirada.train.log import RunLog
from mirada.train.objectives.base import Loss
from mirada.train.optim import Average, Schedule, optimizers

Objective = Callable[[nn.Module, TrainBatch], Loss]
Batches = Callable[[int], Iterator[TrainBatch]]
"""``batches(step)`` iterates the batches of steps ``step``, ``step + 1``, ..."""


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Dials of one stage. ``lr`` is the peak; ``clip`` bounds the gradient norm; ``average`` is the EMA decay."""

    steps: int
    lr: float = 1e-3
    optimizer: Literal["adamw", "muon"] = "adamw"
    warmup: int = 100
    shape: str = "cosine"
    floor: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    """What matrix products are made in; weights, optimizer and losses stay in float32."""
    average: float | None = None
    log_every: int = 20
    save_every: int = 500
    seed: int = 0
    tensorboard: bool = True
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class RunState:
    """What came of a run: ``step`` steps done, ``stopped`` when a signal ended it before its last step."""

    step: int
    stopped: bool


def train(
    model: nn.Module,
    objective: Objective,
    batches: Batches,
    settings: TrainSettings,
    directory: Path,
    extra: Sequence[nn.Module] = (),
) -> RunState:
    """Train what requires a gradient in ``model`` and ``extra`` (heads that are not exported), resuming from ``directory``.

    Leaves averaged weights in ``model`` when ``average`` is set. SIGTERM or Ctrl-C ends after the step, with a checkpoint.
    Raises CheckpointError when the folder holds a run with other settings, FloatingPointError on a loss that is not finite.
    """
    run = _Run(model, objective, settings, directory, extra)
    with RunLog(directory, settings.steps, run.step, settings.tensorboard, settings.quiet) as log, _Stop() as stop:
        clock, told, saved = time.perf_counter(), run.step, run.step
        for batch in batches(run.step) if run.step < settings.steps else ():
            figures = run.one_step(batch)
            log.advance(run.step)
            if run.step % settings.log_every == 0 or run.step == settings.steps:
                now = time.perf_counter()
                log.report(run.step, {**figures(), "seconds_per_step": (now - clock) / (run.step - told)})
                clock, told = now, run.step
            done = run.step >= settings.steps or stop.asked
            if done or run.step % settings.save_every == 0:
                run.save()
                saved = run.step
            if done:
                break
        if run.step > saved:  # there are no more batches
            run.save()
    if run.average is not None:
        run.average.copy_to_model()
    return RunState(run.step, run.step < settings.steps)


class _Run:
    """The mutable state of a run: everything that a checkpoint holds."""

    def __init__(
        self, model: nn.Module, objective: Objective, settings: TrainSettings, directory: Path, extra: Sequence[nn.Module]
    ) -> None:
        torch.manual_seed(settings.seed)
        self.objective, self.model, self.settings, self.directory = objective, model, settings, directory
        self.modules = nn.ModuleList([model, *extra])
        self.device = next(model.parameters()).device
        low = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
        self.optimizers = optimizers(self.modules, settings.weight_decay, settings.betas, settings.optimizer, low)
        self.schedule = Schedule(settings.lr, settings.steps, settings.warmup, settings.shape, settings.floor)  # type: ignore[arg-type]
        self.average = None if settings.average is None else Average(model, settings.average)
        self.step = 0
        self._resume()

    def one_step(self, batch: TrainBatch) -> Callable[[], dict[str, float]]:
        """One update. The figures are read only when called for: reading waits for the device."""
        rate = self.schedule.at(self.step)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group in groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            loss = self.objective(self.model, batch.to(self.device))
        loss.total.backward()
        params = [p for group in groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(params, self.settings.clip, error_if_nonfinite=False)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient is not finite at step {self.step}: lower lr, or resume from the last checkpoint"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        figures = {"loss": loss.total.detach(), **loss.figures, "grad_norm": norm}
        return lambda: {"lr": rate, **{name: float(value) for name, value in figures.items()}}

    def save(self) -> None:
        tensors = {f"model/{k}": v for k, v in self.modules.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            tensors |= {f"optim{i}/{k}": v for k, v in checkpoint.optimizer_tensors(optimizer).items()}
        tensors["random"] = torch.get_rng_state()
        if self.average is not None:
            tensors |= {f"average/{k}": v for k, v in self.average.shadow.items()}
        checkpoint.save(self.directory, self.step, tensors, {"settings": dataclasses.asdict(self.settings)})

    def _resume(self) -> None:
        found = checkpoint.newest(self.directory)
        if found is None:
            return
        tensors, facts = checkpoint.load(found)
        self._check_settings(found, facts["settings"])
        self.modules.load_state_dict(_under(tensors, "model/"))
        for i, optimizer in enumerate(self.optimizers):
            checkpoint.load_optimizer(optimizer, _under(tensors, f"optim{i}/"))
        torch.set_rng_state(tensors["random"])
        if self.average is not None:
            for name, value in _under(tensors, "average/").items():
                self.average.shadow[name].copy_(value)
        self.step = facts["step"]

    def _check_settings(self, found: Path, then: dict) -> None:
        silent = ("log_every", "save_every", "tensorboard", "quiet")
        now = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self.settings).items()}
        changed = [f"{k} {then.get(k)!r} -> {v!r}" for k, v in now.items() if k not in silent and then.get(k) != v]
        if changed:
            raise CheckpointError(f"{found} was trained with other settings ({', '.join(changed)})", "use a new run folder")


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


class _Stop:
    """Turns SIGTERM and Ctrl-C into a flag while the loop runs (in the main thread; elsewhere nothing is installed)."""

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, object] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, *_: object) -> None:
        self.asked = True
