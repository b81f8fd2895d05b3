"""The processes of one model: what the first says to the others, and sums over all.

Words travel as JSON over gloo on the CPU, tensors over the default group beside them; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from mirada.errors import NotAvailable, RequestFailed, SettingsError
from mirada.parallel.plan import Share

FIRST_BYTES = 1024
"""Of a message, sent at once with its length; few are longer."""
IDLE = timedelta(days=365)
"""Ranks that follow wait for so long for a word: an engine may rest."""


class Group:
    """All ranks of torch.distributed's default group, as one model."""

    def __init__(self, ranks: int) -> None:
        import torch.distributed as dist

        self._dist = dist
        if not dist.is_available() or not dist.is_initialized():
            raise NotAvailable(
                f"tensor_parallel={ranks} needs a process group of {ranks} processes, and there is none",
                "start with torchrun --nproc-per-node, and call torch.distributed.init_process_group; see docs/parallel.md",
            )
        if dist.get_world_size() != ranks:
            raise SettingsError(
                f"tensor_parallel={ranks}, and the process group has {dist.get_world_size()} processes",
                f"start {ranks} processes, or say tensor_parallel={dist.get_world_size()}",
            )
        self.share = Share(dist.get_rank(), ranks)
        self._ended = False
        self.gone = False
        """Whether a call has failed: nothing can be computed together any more."""
        self._words: Any = dist.new_group(backend="gloo", timeout=IDLE)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x``, in place; the same bits on every rank."""
        self._call(self._dist.all_reduce, x)
        return x

    def say(self, what: str, facts: dict[str, Any] | None = None, tensors: Sequence[Tensor] = ()) -> None:
        """From the first rank to all others, who ``hear`` it."""
        described = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]
        text = json.dumps([what, facts or {}, described]).encode()
        first = torch.zeros(FIRST_BYTES, dtype=torch.uint8)
        first[:8] = torch.tensor([len(text)]).view(torch.uint8)
        head = torch.frombuffer(bytearray(text[: FIRST_BYTES - 8]), dtype=torch.uint8)
        first[8 : 8 + len(head)] = head
        self._call(self._dist.broadcast, first, 0, group=self._words)
        if len(text) > FIRST_BYTES - 8:
            rest = torch.frombuffer(bytearray(text[FIRST_BYTES - 8 :]), dtype=torch.uint8)
            self._call(self._dist.broadcast, rest, 0, group=self._words)
        for tensor in tensors:
            self._call(self._dist.broadcast, tensor.contiguous(), 0)

    def hear(self, device: torch.device) -> tuple[str, dict[str, Any], list[Tensor]]:
        """What the first rank says next; waits for it. Its tensors come to lie on ``device``."""
        first = torch.empty(FIRST_BYTES, dtype=torch.uint8)
        self._call(self._dist.broadcast, first, 0, group=self._words)
        length = int(first[:8].view(torch.int64))
        text = bytes(first[8 : 8 + length].tolist())
        if length > FIRST_BYTES - 8:
            rest = torch.empty(length - (FIRST_BYTES - 8), dtype=torch.uint8)
            self._call(self._dist.broadcast, rest, 0, group=self._words)
            text += bytes(rest.tolist())
        what, facts, described = json.loads(text)
        tensors = [torch.empty(shape, dtype=getattr(torch, dtype), device=device) for dtype, shape in described]
        for tensor in tensors:
            self._call(self._dist.broadcast, tensor, 0)
        return what, facts, tensors

    def tell(self, what: str, facts: dict[str, Any] | None = None) -> None:
        """As ``say``, of what must be done here in any case: if others are gone, the next forward will tell."""
        if not self.gone:
            with contextlib.suppress(RequestFailed):
                self.say(what, facts)

    def _call(self, call: Callable[..., Any], *args: Any, **options: Any) -> None:
        """RequestFailed if it fails: then another process is gone, or has been waited for too long."""
        try:
            if not self.gone:
                call(*args, **options)
                return
            cause = None
        except RuntimeError as error:
            cause, self.gone = error, True
        raise RequestFailed(
            "another process of this model is gone", "see its own message; then start all of them again"
        ) from cause

    def end(self) -> None:
        """Let the others go; once."""
        if not self._ended:
            self._ended = True
            self.tell("end")

    def join_columns(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """[R, own columns] of every rank, side by side: [R, sum of ``sizes``] on the first rank, ``x`` itself on the others."""
        most = max(sizes)
        padded = x if x.shape[1] == most else torch.nn.functional.pad(x, (0, most - x.shape[1]))
        made = [torch.empty_like(padded) for _ in sizes] if self.share.leads else None
        self._call(self._dist.gather, padded.contiguous(), made, 0)
        return x if made is None else torch.cat([part[:, :size] for part, size in zip(made, sizes, strict=True)], 1)
