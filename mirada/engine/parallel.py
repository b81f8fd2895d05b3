"""One model over several processes: the first runs the engine, the others follow it step by step.

Which sequences a step computes depends on when requests came and what memory is free, so no two engines would decide alike:
one decides, and says each forward to the others, which hold their share of weights and cache and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mirada.engine import memory
from mirada.errors import CheckpointError, SettingsError
from mirada.layers.cache import make_cache
from mirada.models.sharded import head_sizes, load_share, plan_of, share_bytes
from mirada.parallel.group import Group
from mirada.parallel.plan import Share
from mirada.parallel.wire import LeadCache, follow, wire


def join(ranks: int) -> Group:
    """The group of ``ranks`` processes. Raises SettingsError for another number, NotAvailable where no process group is."""
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise SettingsError(f"tensor_parallel={ranks!r} is out of range", "give a number of processes, or None for one")
    return Group(ranks)


def check_alone(**others: Any) -> None:
    """SettingsError if another way of placing or keeping weights is asked for beside tensor_parallel."""
    for name, value in others.items():
        if value is not None:
            raise SettingsError(f"{name}={value!r} is given beside tensor_parallel", "give one of the two")


def own_device(device: Any, share: Share) -> Any:
    """The GPU that belongs to a rank, unless a device is given or there is none."""
    if device is None and torch.cuda.is_available():
        return torch.device("cuda", share.rank % torch.cuda.device_count())
    return device


def load_shared(directory: Path, dtype: torch.dtype, device: torch.device, group: Group) -> Any:
    """This rank's share, with sums and joins in place. Raises OutOfMemory before any weight is read, else as ``load_share``."""
    name = f"a share of model {directory.name!r}"
    needed = share_bytes(directory, dtype, group.share)
    memory.require(needed, memory.available(device), name, "use more processes, or dtype='bfloat16'")
    model: Any = load_share(directory, dtype, device, group.share)
    wire(model, plan_of(model.config), head_sizes(model.config, group.share.ranks), group)
    return model


def spec_of(model: Any, spec: Mapping[str, Any]) -> dict[str, Any]:
    """``Family.cache_spec`` for the heads that a model really has."""
    made = dict(spec)
    if "num_kv_heads" in made:
        made["num_kv_heads"] = model.decoder.layers[0].attention.kv_heads
    return made


def lead(parts: Any, cache: Any, kv: str, layout: str | None) -> LeadCache:
    """Tell the others that an engine begins, and with which cache; theirs does from now on what the one returned does.

    SettingsError on a rank that is not the first.
    """
    group: Group = parts.group
    if not group.share.leads:
        raise SettingsError(
            f"rank {group.share.rank} of {group.share.ranks} runs no engine of its own", "call VLM.follow there"
        )
    group.say("begin", _facts(parts, kv, layout, cache.budget))
    return LeadCache(cache, group)


def serve(parts: Any) -> None:
    """Follow the first rank until its engine is closed. Raises CheckpointError if it has opened another model or type,
    SettingsError on the first rank, RequestFailed if that is gone."""
    group: Group = parts.group
    if group.share.leads:
        raise SettingsError("the first rank runs the engine", "call VLM(...) there, and VLM.follow on the others")
    weight = next(parts.model.parameters())
    what, facts, _ = group.hear(weight.device)
    if what != "begin" or facts != _facts(parts, facts.get("kv", ""), facts.get("layout"), facts.get("budget")):
        raise CheckpointError("the first rank has opened another model", "give all ranks the same model and dtype")
    how = {name: facts[name] for name in ("layout", "kv", "budget")}
    cache = make_cache(parts.cache_spec, weight.dtype, weight.device, **how)
    follow(parts.model, cache, group)


def _facts(parts: Any, kv: str, layout: str | None, budget: int | None) -> dict[str, Any]:
    dtype = str(next(parts.model.parameters()).dtype)
    return {"config": parts.model.config_text, "dtype": dtype, "kv": kv, "layout": layout, "budget": budget}
