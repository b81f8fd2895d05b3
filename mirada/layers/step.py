"""A decoder's forward for a few new tokens on a CPU, as one call of compiled code (``kernels/step.c``).

For one token a small model spends most of its time between its matrix products: in some twenty torch calls per layer. Here a
plan is made once (``step_plan``), of the addresses of all weights, and a step is one call that holds no lock of Python. What
the plan cannot take (gradients, hooks, modules of other kinds, other devices) is left to the modules' own forward, which is the
reference.

n new tokens; D width; V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import repeat
from operator import contains, eq, is_
from typing import Any

import torch
from torch import Tensor, nn

from mirada.layers.batch import Batch
from mirada.layers.cache import SlabCache
from mirada.layers.kernels.library import library
from mirada.layers.kinds import DEFAULT
from mirada.layers.latent_cache import LatentCache
from mirada.layers.mla import MLA
from mirada.layers.moe import Experts
from mirada.layers.step_parts import Parts, Unplannable
from mirada.layers.step_plan import FEW_ROWS, KEPT, Plan

__all__ = ["FEW_ROWS", "MOST_ROWS", "Step"]

MOST_ROWS = 1024
"""New tokens that one call takes."""
_HELD = ("matrix", "matrices", "sizes", "scale", "routing")
"""What a plan reads of a module beside its parameters."""


class Step:
    """Plans for one decoder, made when they are wanted and again when a module or a weight is no longer what it was.

    A copy or a pickle begins without a plan: addresses are of one process.
    """

    def __init__(self) -> None:
        self.on = True
        """False: every forward is the modules' own."""
        self._plan: Plan | None = None
        self._refused: dict[bool, _Watch] = {}
        """What could not be planned without and with a head: nothing is tried again before it changes."""
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Step], tuple[()]]:
        return Step, ()

    @property
    def planned(self) -> bool:
        """Whether there is a plan."""
        return self._plan is not None

    def run(
        self,
        root: nn.Module,
        parts: Callable[[], Parts],
        x: Tensor | None,
        batch: Batch,
        cache: Any,
        head: nn.Module | None = None,
    ) -> tuple[Tensor | None, Tensor | None] | None:
        """Embeddings x [n, D] -> hidden values [n, D] after the final norm, and with ``head`` float32 logits [n, V].

        Without x the embeddings are those of the batch's tokens, and only logits are made.
        ``parts`` gives the modules below ``root`` that compute them, or raises Unplannable. None, and nothing written, where
        this is not for a plan. OutOfMemory if the cache has no room.
        """
        if not self._suits(x, batch, cache):
            return None
        with self._lock:
            plan = self._current(root, parts, head)
            return None if plan is None or not plan.fits(x, batch, cache) else plan.run(x, batch, cache, head is not None)

    def _suits(self, x: Tensor | None, batch: Batch, cache: Any) -> bool:
        given = batch.tokens if x is None else x
        return (
            self.on
            and type(cache) in (SlabCache, LatentCache)
            and 0 < given.shape[0] <= MOST_ROWS
            and not torch.is_grad_enabled()
            and type(given) is Tensor
            and (given.dtype == torch.int64 if x is None else given.dtype in KEPT)
            and given.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and library() is not None
        )

    def _current(self, root: nn.Module, parts: Callable[[], Parts], head: nn.Module | None) -> Plan | None:
        plan = self._plan
        if plan is not None and (head is None or head is plan.head) and plan.watch.holds():
            return plan
        refused = self._refused.pop(head is not None, None)
        if refused is None or not refused.holds():
            refused = _Watch([root] if head is None else [root, head])
            try:
                self._plan = Plan(parts(), head, refused)
                return self._plan
            except Unplannable:
                pass
        self._refused[head is not None] = refused
        return None


class _Watch:
    """What a plan rests on: modules, parameters, where they lie, and that nothing is put between them."""

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        modules = [module for root in roots for module in root.modules()]
        held: list[tuple[dict[str, Any], str, Any]] = []
        places: list[tuple[Tensor, int]] = []
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._own = [module.__dict__ for module in modules]
        self._attentions = [module for module in modules if hasattr(module, "attention_kind")]
        self._latents = [module for module in modules if isinstance(module, MLA)]
        self._experts = [module for module in modules if isinstance(module, Experts)]
        self._was_plain = self.plain()
        for module in modules:
            held += [(module.__dict__, name, module.__dict__[name]) for name in _HELD if name in module.__dict__]
            held += [(module._modules, name, child) for name, child in module._modules.items()]
            for name, parameter in module._parameters.items():
                held.append((module._parameters, name, parameter))
                if parameter is not None:
                    places.append((parameter, parameter.data_ptr()))
        # Columns, which are compared below without a line of Python for each: this is asked before every step.
        self._holders, self._names, self._values = zip(*held, strict=True) if held else ((), (), ())
        self._tensors, self._addresses = zip(*places, strict=True) if places else ((), ())

    def plain(self) -> bool:
        """Whether nothing is hooked in or put in a forward's place, no adapter works inside a module, all experts are here, and
        attention is of the kind that is compiled."""
        if any(self._hooks) or any(map(contains, self._own, repeat("forward"))):
            return False
        if any(module.variants for module in self._latents):
            return False
        if any(module.adapted is not None or module.first is not None for module in self._experts):
            return False
        return all(module.attention_kind == DEFAULT for module in self._attentions)

    def holds(self) -> bool:
        """Whether all is as it was seen, and as ``plain`` or not."""
        return (
            all(map(is_, map(dict.get, self._holders, self._names), self._values))
            and all(map(eq, map(Tensor.data_ptr, self._tensors), self._addresses))
            and self.plain() == self._was_plain
        )
