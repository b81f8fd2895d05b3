"""Sums, joins and words put between the modules of a sharded model, as hooks: the modules themselves know nothing of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mirada.errors import RequestFailed
from mirada.layers.batch import Batch
from mirada.parallel.group import Group
from mirada.parallel.plan import Plan


def wire(model: Any, plan: Plan, head_sizes: Sequence[int], group: Group) -> None:
    """Partial outputs are summed over all ranks, and the columns of the vocabulary (``head_sizes`` of them per rank) come
    together on the first, which says every call of decoder and head to the others."""
    for name, module in model.named_modules():
        if plan.is_sum(name):
            module.register_forward_hook(lambda _, args, out: group.sum(out))
    model.lm_head.register_forward_hook(lambda _, args, out: group.join_columns(out, head_sizes))
    if hasattr(model.decoder, "steps"):
        model.decoder.steps.on = False  # a step in one call has no place for sums
    if group.share.leads:
        lead = _Lead(group)
        for module, say in ((model.decoder, lead.tokens), (model.lm_head, lead.head)):
            module.register_forward_pre_hook(say)
            module.register_forward_hook(lead.done)


class _Lead:
    """Says what the first rank computes, and refuses to go on once a call has failed half-way: the others wait inside it."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._inside = False

    def tokens(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        x, batch = args[0], args[1]
        facts = {"lengths": batch.lengths, "past": batch.past, "slots": batch.slots}
        self._enter("tokens", facts, [x, batch.positions.contiguous()])

    def head(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._enter("head", {}, [args[0]])

    def _enter(self, what: str, facts: dict[str, Any], tensors: list[Tensor]) -> None:
        if self._inside:
            raise RequestFailed("the ranks are out of step since a forward failed", "start all processes again")
        self._inside = True
        self._group.say(what, facts, tensors)

    def done(self, *_: Any) -> None:
        self._inside = False


class LeadCache:
    """The first rank's cache: what it does to slots and kept blocks is said to the others, who do the same to theirs."""

    def __init__(self, cache: Any, group: Group) -> None:
        self._cache, self._group = cache, group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def allocate(self, slot: int) -> None:
        self._group.tell("allocate", {"slot": slot})
        self._cache.allocate(slot)

    def free(self, slot: int) -> None:
        self._group.tell("free", {"slot": slot})
        self._cache.free(slot)

    def store(self, most: int, block: int) -> LeadStore:
        self._group.tell("store", {"most": most, "block": block})
        return LeadStore(self._cache.store(most, block), self._group)


class LeadStore:
    """The same of blocks that are kept for later requests."""

    def __init__(self, store: Any, group: Group) -> None:
        self._store, self._group = store, group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def keep(self, slot: int, first: int, count: int) -> list[int]:
        self._group.tell("keep", {"slot": slot, "first": first, "count": count})
        return self._store.keep(slot, first, count)

    def reuse(self, slot: int, handles: Sequence[int]) -> None:
        self._group.tell("reuse", {"slot": slot, "handles": list(handles)})
        self._store.reuse(slot, handles)

    def drop(self, handle: int) -> None:
        self._group.tell("drop", {"handle": handle})
        self._store.drop(handle)


def follow(model: Any, cache: Any, group: Group) -> None:
    """Do on this rank's share what the first rank says, until it says that it is over. RequestFailed if it is gone."""
    device = next(model.parameters()).device
    store: Any = None
    with torch.inference_mode():
        while True:
            what, facts, tensors = group.hear(device)
            if what == "end":
                return
            if what == "tokens":
                x, positions = tensors
                lengths, past, slots = (tuple(facts[name]) for name in ("lengths", "past", "slots"))
                model.decoder(x, Batch(positions[0], positions, lengths, past, slots), cache)
            elif what == "head":
                model.lm_head(tensors[0])
            elif what == "store":
                store = cache.store(**facts)
            else:
                of = store if what in ("keep", "reuse", "drop") else cache
                getattr(of, what)(**facts)
