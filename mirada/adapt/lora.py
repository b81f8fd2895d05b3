"""Low-rank adapters beside a model's matrices: y += (x Aᵀ) Bᵀ · scale, for the rows of those requests that asked for it.

Several adapters work in one forward, each on rows of its own; the matrices themselves never change, so they may be packed, and
rows without an adapter are computed as if there were none. T rows of a forward, C inputs and R outputs of a matrix, r rank.
Ported facts: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732), huggingface/peft ``tuners/lora/config.py`` and ``layer.py``,
``utils/other.py`` (get_pattern_key), ``tuners/tuners_utils.py`` (check_target_module_exists).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirada.errors import ConfigError, TensorError
from mirada.keys import Keys
from mirada.layers.linear import linear
from mirada.layers.mla import MLA
from mirada.layers.moe import Experts

PREFIX = "base_model.model."
"""What PEFT writes before the names of modules."""
_NAME = re.compile(r"(.+)\.lora_([AB])\.weight")
_COPY = ".base_layer.weight"
# How training began or ran, other software, or where it came from.
_IGNORED = (
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "lora_dropout",
    "exclude_modules", "layers_to_transform", "layers_pattern", "eva_config", "qalora_group_size", "megatron_core",
    "ensure_weight_tying",
)  # fmt: skip
# Other methods under the name of LoRA; each would change the arithmetic, or the weights beneath.
_OFF = (
    "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "modules_to_save", "layer_replication",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config", "corda_config",
    "lora_ga_config", "loftq_config", "megatron_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """adapter_config.json, typed. Modules are named as PEFT names them, without ``base_model.model.``."""

    r: int
    alpha: float
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    targets: str | tuple[str, ...] | None = None
    """A regular expression, endings of names, or not said."""

    def rank(self, module: str) -> int:
        return self.rank_pattern.get(_pattern(self.rank_pattern, module), self.r)

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.alpha)
        return alpha / (rank**0.5 if self.rslora else rank)

    def covers(self, module: str) -> bool:
        """Whether ``targets`` names the module."""
        if self.targets is None or self.targets == "all-linear":
            return True
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, module) is not None
        return any(module == target or module.endswith(f".{target}") for target in self.targets)


def _pattern(patterns: Iterable[str], module: str) -> str:
    """The first of ``patterns`` that the end of ``module`` matches."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), "")


def read_config(mapping: Mapping[str, Any], where: str = "adapter_config.json") -> LoraConfig:
    """ConfigError names a key or value that is not understood: adapters of other methods are refused, never read in part."""
    keys = Keys(mapping, where)
    method = keys.take("peft_type", str)
    if method != "LORA":
        raise ConfigError(f"{where}: peft_type {method!r} is not supported", "only LORA is; merge the adapter into its model")
    keys.ignore(*_IGNORED)
    for name in _OFF:
        keys.expect(name, None, False, {}, [])
    keys.expect("bias", "none")
    # What others begin with is taken out of the model's own weights, which then are no longer the released ones.
    keys.expect("init_lora_weights", True, False, "gaussian", "orthogonal", "eva")
    keys.expect("runtime_config", None, {"ephemeral_gpu_offload": False})
    made = LoraConfig(
        r=keys.take("r", int),
        alpha=keys.take("lora_alpha", float),
        rslora=keys.take("use_rslora", bool, False),
        rank_pattern=_numbers(keys, "rank_pattern", (int,)),
        alpha_pattern=_numbers(keys, "alpha_pattern", (int, float)),
        targets=_targets(keys),
    )
    keys.done()
    for rank in (made.r, *made.rank_pattern.values()):
        if rank < 1:
            raise ConfigError(f"{where}: a rank is {rank}", "it must be at least 1")
    return made


def _numbers(keys: Keys, name: str, kinds: tuple[type, ...]) -> dict[str, Any]:
    found = keys.take(name, (dict, type(None)), None) or {}
    for pattern, value in found.items():
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ConfigError(f"{keys.where}: {name} of {pattern!r} is {value!r}", "it must be a number")
        _compile(pattern, f"{keys.where}: {name}")
    return dict(found)


def _targets(keys: Keys) -> str | tuple[str, ...] | None:
    found = keys.take("target_modules", (str, list, type(None)), None)
    if isinstance(found, str):
        _compile(found, f"{keys.where}: target_modules")
    return tuple(str(item) for item in found) if isinstance(found, list) else found


def _compile(pattern: str, where: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{where}: {pattern!r} is not a regular expression ({error})", "correct it") from error


def copies(names: Iterable[str]) -> dict[str, str]:
    """Module -> name of a copy of its own matrix, which PEFT saves beside adapters of the head."""
    return {name.removeprefix(PREFIX).removesuffix(_COPY): name for name in names if name.endswith(_COPY)}


def pairs(names: Iterable[str], config: LoraConfig, where: str) -> dict[str, tuple[str, str]]:
    """Module -> names of its A and B. TensorError for a tensor that is not one of a pair, or that the config does not name."""
    found: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        parts = _NAME.fullmatch(name.removeprefix(PREFIX))
        if not name.startswith(PREFIX) or parts is None:
            raise TensorError(
                f"{where} holds tensor {name!r}, which belongs to no LoRA pair", f"names must be {PREFIX}MODULE.lora_A.weight"
            )
        module, side = parts[1], parts[2]
        if not config.covers(module):
            raise TensorError(
                f"{where} holds tensor {name!r}, which target_modules does not name",
                "take the adapter_config.json that belongs to these weights",
            )
        found.setdefault(module, {})[side] = name
    for module, sides in found.items():
        for side in "AB":
            if side not in sides:
                raise TensorError(f"{where} lacks tensor '{PREFIX}{module}.lora_{side}.weight'", "save the adapter again")
    return {module: (sides["A"], sides["B"]) for module, sides in found.items()}


@dataclass(frozen=True, eq=False)
class Part:
    """What is added to outputs [start, start + len(b)), from columns [first, first + r) of x Aᵀ."""

    start: int
    first: int
    b: Tensor
    """[n, r], already times the scale."""


@dataclass(frozen=True, eq=False)
class Patch:
    """What one adapter adds to the product of one matrix; queries, keys and values that are fused are parts of one."""

    a: Tensor
    """[sum of ranks, C]."""
    parts: tuple[Part, ...]

    def add(self, x: Tensor, out: Tensor, rows: slice | Tensor) -> None:
        """Add to ``rows`` of ``out`` [T, R], in place, what those of x [T, C] give."""
        inner = linear(x[rows].to(self.a.dtype), self.a)
        for part in self.parts:
            count, rank = part.b.shape
            made = F.linear(inner[:, part.first : part.first + rank], part.b).to(out.dtype)
            columns = out[:, part.start : part.start + count]
            if isinstance(rows, slice):
                columns[rows] += made
            else:
                columns.index_add_(0, rows, made)

    def merged(self, weight: Tensor) -> Tensor:
        """``weight`` [R, C] plus what this adds, as a new matrix."""
        made = weight.to(self.a.dtype, copy=True)
        for part in self.parts:
            count, rank = part.b.shape
            made[part.start : part.start + count].addmm_(part.b, self.a[part.first : part.first + rank])
        return made.to(weight.dtype)

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + sum(part.b.nbytes for part in self.parts)


def patch(made: Sequence[tuple[int, Tensor, Tensor]]) -> Patch:
    """Of (first output, A [r, C], B [n, r] times its scale) of every stored matrix that makes rows of one."""
    parts, first = [], 0
    for start, a, b in made:
        parts.append(Part(start, first, b))
        first += len(a)
    return Patch(torch.cat([a for _, a, _ in made]), tuple(parts))


Place = tuple[str, int | None]
"""Path of a module, or of a stack of matrices and which of them."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter, ready for one model."""

    key: str
    """Hash of all that it adds: equal keys, equal answers."""
    media_key: str
    """Of what it adds to tower and projector; empty: nothing, so pictures are encoded as without it."""
    patches: Mapping[Place, Patch]

    @property
    def nbytes(self) -> int:
        return sum(patch.nbytes for patch in self.patches.values())


Segments = Sequence[tuple[Adapter | None, int]]
"""Whose the rows of a forward are: an adapter (or none) and how many rows, in order."""


class Rows:
    """The rows of each adapter in one kind of forward."""

    def __init__(self, segments: Segments) -> None:
        self.total = 0
        self.members: dict[Adapter, list[int]] = {}
        """Which of the segments are its own."""
        self._spans: dict[Adapter, list[tuple[int, int]]] = {}
        self._indices: dict[tuple[Adapter, torch.device], Tensor] = {}
        self.count = len(segments)
        for index, (adapter, size) in enumerate(segments):
            start, self.total = self.total, self.total + size
            if adapter is None or not size:
                continue
            self.members.setdefault(adapter, []).append(index)
            spans = self._spans.setdefault(adapter, [])
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], self.total)
            else:
                spans.append((start, self.total))

    def of(self, adapter: Adapter, device: torch.device) -> slice | Tensor:
        spans = self._spans[adapter]
        if len(spans) == 1:
            return slice(*spans[0])
        if (adapter, device) not in self._indices:
            self._indices[adapter, device] = torch.cat([torch.arange(*span) for span in spans]).to(device)
        return self._indices[adapter, device]


DOMAINS = ("visual", "projector", "decoder", "lm_head")
"""Parts of a model whose rows differ: patches, features, tokens, and tokens whose logits are wanted."""
Add = Callable[[str, int, Tensor, Tensor, Tensor], None]


class Adapted:
    """Adds what adapters add while one of its forwards is open, by hooks that are there only then: a model at rest is as it was
    built, and forwards without an adapter take every short cut. For one thread."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @contextmanager
    def over(self, segments: Mapping[str, Segments]) -> Iterator[None]:
        """Rows of the forward inside, by domain; a domain that is not named has no adapters."""
        undo: list[Callable[[], None]] = []
        try:
            for domain, given in segments.items():
                rows = Rows(given)
                for path, wanted in _by_module(domain, rows.members).items():
                    undo.append(self._install(path, wanted, rows))
            yield
        finally:
            for call in undo:
                call()

    def _install(self, path: str, wanted: list[tuple[Adapter, str, int | None, Patch]], rows: Rows) -> Callable[[], None]:
        module = self._model.get_submodule(path)
        if isinstance(module, Experts):
            module.adapted = _expert_adder(wanted, rows)
            return lambda: setattr(module, "adapted", None)
        parent, _, child = path.rpartition(".")
        owner = self._model.get_submodule(parent)
        if isinstance(owner, MLA) and child == "kv_b":
            # Its input is not the tokens of this forward but all that the cache holds, and its weight is read by itself.
            owner.variants = _variants(wanted, rows)
            return lambda: setattr(owner, "variants", ())
        return module.register_forward_hook(_adder([(adapter, patch) for adapter, _, _, patch in wanted], rows)).remove


def _by_module(domain: str, adapters: Iterable[Adapter]) -> dict[str, list[tuple[Adapter, str, int | None, Patch]]]:
    """Path of a module -> (adapter, name of a stack in it, index there, patch)."""
    made: dict[str, list[tuple[Adapter, str, int | None, Patch]]] = {}
    for adapter in adapters:
        for (path, index), found in adapter.patches.items():
            if path.partition(".")[0] != domain:
                continue
            owner, _, name = path.rpartition(".")
            made.setdefault(path if index is None else owner, []).append((adapter, name, index, found))
    return made


def _adder(wanted: list[tuple[Adapter, Patch]], rows: Rows) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        x = args[0]
        if x.ndim != 2 or len(x) != rows.total:
            raise RuntimeError(f"adapters were given {rows.total} rows, and the forward has {tuple(x.shape)}")
        for adapter, found in wanted:
            found.add(x, out, rows.of(adapter, x.device))

    return hook


def _expert_adder(wanted: list[tuple[Adapter, str, int | None, Patch]], rows: Rows) -> Add:
    """For ``Experts.adapted``: the tokens that one expert is given are any of the forward's."""
    table: dict[tuple[str, int | None], list[tuple[Adapter, Patch]]] = {}
    for adapter, name, index, found in wanted:
        table.setdefault((name, index), []).append((adapter, found))
    owners: dict[tuple[Adapter, torch.device], Tensor] = {}

    def add(name: str, expert: int, tokens: Tensor, x: Tensor, out: Tensor) -> None:
        for adapter, found in table.get((name, expert), ()):
            key = (adapter, x.device)
            if key not in owners:
                owners[key] = torch.zeros(rows.total, dtype=torch.bool, device=x.device)
                owners[key][rows.of(adapter, x.device)] = True
            own = owners[key][tokens].nonzero()[:, 0]
            if len(own):
                found.add(x, out, own)

    return add


def _variants(wanted: list[tuple[Adapter, str, int | None, Patch]], rows: Rows) -> tuple[Any, ...]:
    """For ``MLA.variants``: which sequences have another ``kv_b``, and which have the model's own."""
    changed = [(found.merged, tuple(rows.members[adapter])) for adapter, _, _, found in wanted]
    taken = {index for _, members in changed for index in members}
    plain = tuple(index for index in range(rows.count) if index not in taken)
    return (*((((None, plain),)) if plain else ()), *changed)
