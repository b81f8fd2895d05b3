"""All ranks of a model as threads of this process, in step: sums and joins without torch.distributed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mirada.engine.parallel import spec_of
from mirada.layers.batch import Batch
from mirada.layers.cache import make_cache
from mirada.parallel.plan import Plan, Share
from mirada.parallel.wire import wire

PATIENCE = 20


class Together:
    """Stands for ``parallel.group.Group`` on every rank."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._barrier = threading.Barrier(ranks)
        self._given: list[Tensor] = [torch.empty(0)] * ranks

    def wire(self, model: Any, plan: Plan, sizes: Sequence[int], rank: int) -> None:
        wire(model, plan, sizes, _Rank(self, Share(rank, self.ranks)))  # pyright: ignore[reportArgumentType]

    @staticmethod
    def spec(model: Any, spec: Any) -> dict[str, Any]:
        return spec_of(model, spec)

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        """What every rank gave."""
        self._given[rank] = x.clone()
        self._barrier.wait(PATIENCE)
        made = list(self._given)
        self._barrier.wait(PATIENCE)
        return made


class _Rank:
    def __init__(self, group: Together, share: Share) -> None:
        self._group, self.share = group, share

    def sum(self, x: Tensor) -> Tensor:
        return x.copy_(sum(self._group.exchange(self.share.rank, x)))  # pyright: ignore[reportArgumentType]

    def join_columns(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        made = self._group.exchange(self.share.rank, x)
        assert [part.shape[1] for part in made] == list(sizes)
        return torch.cat(made, 1)

    def say(self, *_: Any) -> None:
        """Everybody is called anyway."""


def follow_all(models: Sequence[Any], specs: Sequence[Any], x: Tensor, batch: Batch) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Of each model: hidden values and logits of ``batch``, then of one more token of each sequence, all over a cache."""
    made: list[Any] = [None] * len(models)

    def work(rank: int) -> None:
        with torch.inference_mode():
            try:
                made[rank] = _steps(models[rank], specs[rank], x, batch)
            except BaseException as error:
                made[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), name=f"rank {rank}") for rank in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    for result in made:
        if not isinstance(result, tuple):
            raise result
    return made


def _steps(model: Any, spec: Any, x: Tensor, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    cache = make_cache(spec, torch.float32, "cpu")
    for slot in batch.slots:
        cache.allocate(slot)
    first = model.decoder(x, batch, cache)
    ends = torch.tensor(batch.lengths).cumsum(0) - 1
    later = replace(
        batch, tokens=batch.tokens[ends], positions=batch.positions[:, ends] + 1, lengths=(1,) * len(ends), past=batch.lengths
    )
    second = model.decoder(x[ends], later, cache)
    return [first, second], [model.lm_head(first), model.lm_head(second)]
