"""What can be said of a model from its config.json alone: counts, bytes, memory of the cache, licence.

Counts come from modules on the meta device, which take no memory; bytes are those counts times the size of a value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mirada import adapt
from mirada.adapt.method import Scheme, in_blocks
from mirada.layers.cache import make_cache
from mirada.models.family import family_of
from mirada.models.layout import Layout
from mirada.models.load import build

CONTEXT = 8192
"""Tokens of context that memory is stated for (fewer if the model's context is shorter)."""
GROUP = 128
"""Columns that share a scale and a zero in the int4 that is reckoned with."""
CARDS = (8, 12, 16, 24, 32, 48, 80, 96, 141, 192)
"""GB of memory of GPUs that are sold."""
_SIZES = {"F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1, "I64": 8}


@dataclass(frozen=True)
class Licence:
    """Under what terms a release is given, as far as it is known here."""

    name: str
    conditions: str
    source: str


_PAGE = Licence("not recorded here", "see the model page", "")
_APACHE = "keep the notices; no warranty"
_QWEN_SOURCE = "README of QwenLM/Qwen2-VL"
# hidden size of the decoder -> licence: the three releases of Qwen2-VL are told apart by it.
_QWEN2_VL = {
    1536: Licence("Apache-2.0", _APACHE, _QWEN_SOURCE),
    3584: Licence("Apache-2.0", _APACHE, _QWEN_SOURCE),
    8192: Licence("Qwen licence", "of Alibaba Cloud, not an open-source licence: read it on the model page", _QWEN_SOURCE),
}
_KIMI = Licence("MIT", "keep the copyright notice; no warranty", "model card of moonshotai/Kimi-VL-A3B-Instruct")


@dataclass(frozen=True)
class Facts:
    """Everything ``describe`` finds. Parameters are counts, the rest is in bytes or tokens."""

    model_type: str
    dtype: str
    """As released."""
    parameters: int
    """Of the model as it runs; a tied head is counted once."""
    vision: int
    """Of these in the tower and the projector."""
    experts: int
    """Of these in routed experts."""
    active: int
    """Multiplied for one token of text: layers with the experts that are chosen, and the head."""
    unused: int
    """In the released files besides, and never loaded, as far as it is known."""
    weights: Mapping[str, int]
    """Bytes per type: float32, bfloat16, int8, int4, and ``as stored`` for a quantised checkpoint."""
    cache_values: int
    """Values that one token of context keeps."""
    cache_kind: str
    context: int
    working_values: int
    """Values in passing per token of a prefill."""
    licence: Licence

    def cache_bytes(self, tokens: int, itemsize: int = 2) -> int:
        return tokens * self.cache_values * itemsize

    def needed(self, kind: str, tokens: int) -> int:
        """Bytes to answer with ``tokens`` of context: weights, cache and what passes through a layer."""
        itemsize = 4 if kind == "float32" else 2
        return self.weights[kind] + self.cache_bytes(tokens, itemsize) + tokens * self.working_values * itemsize


def describe(mapping: Mapping[str, Any], where: str = "config.json") -> Facts:
    """The facts of the model that config.json describes. Raises ConfigError for a config that is not understood."""
    family, scheme = family_of(mapping, where), adapt.read(mapping, where)
    config = family.config(mapping)
    model, layout = build(mapping, device="meta", where=where), family.layout(config)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(counts.values())
    vision = sum(n for name, n in counts.items() if not name.startswith(("decoder.", "lm_head.")))
    experts = sum(n for name, n in counts.items() if ".experts." in name)
    text = config.text
    chosen = experts * text.num_experts_per_tok // text.n_routed_experts if experts else 0
    head = 0 if text.tie_word_embeddings else counts["decoder.embed.weight"]  # a tied table is multiplied by as the head
    spec = dict(family.cache_spec(config))
    return Facts(
        model_type=family.model_type,
        dtype=str(mapping.get("torch_dtype") or mapping.get("dtype") or "bfloat16"),
        parameters=total,
        vision=vision,
        experts=experts,
        active=total - vision - experts + chosen - head,
        unused=_unused(family.model_type, config),
        weights=_weights(layout, total, scheme),
        cache_values=make_cache(spec, torch.int8, "meta").bytes_per_token,
        cache_kind=_cache_kind(spec, text),
        context=text.max_position_embeddings,
        working_values=4 * text.hidden_size + 3 * text.num_attention_heads * text.head_dim + 3 * text.intermediate_size,
        licence=_licence(family.model_type, text),
    )


def _weights(layout: Layout, total: int, scheme: Scheme | None) -> dict[str, int]:
    """int8 and int4 are those of the matrices in the decoder's layers, as quantised releases have them; the rest stays 16 bit.

    int8: a scale of 16 bits per row. int4: a scale of 16 bits and a zero of 4 per group.
    """
    matrices = [shape for name, (_, _, shape) in layout.stored().items() if in_blocks(name) and len(shape) == 2]
    packed = sum(math.prod(shape) for shape in matrices)
    groups = sum(rows * -(-columns // GROUP) for rows, columns in matrices)
    plain = 2 * (total - packed)
    made = {
        "float32": 4 * total,
        "bfloat16": 2 * total,
        "int8": plain + packed + 2 * sum(rows for rows, _ in matrices),
        "int4": plain + packed // 2 + 2 * groups + groups // 2,
    }
    return made | ({"as stored": _stored(layout, scheme)} if scheme else {})


def _stored(layout: Layout, scheme: Scheme) -> int:
    """Bytes of a quantised checkpoint: what its scheme covers as its fields say, the rest in 16 bits."""
    size = 0
    for name, (_, _, shape) in layout.stored().items():
        if not scheme.covers(name, shape):
            size += 2 * math.prod(shape)
            continue
        for field in scheme.fields(name, shape).values():
            if not field.optional:
                size += math.prod(field.shapes[0]) * _SIZES[field.dtypes[0]]
    return size


def _cache_kind(spec: Mapping[str, Any], text: Any) -> str:
    if spec.get("kind") == "latent":
        return f"latent: {spec['latent_dim']} + {spec['rope_dim']} values a layer, whatever the number of heads"
    heads, shared = text.num_attention_heads, spec["num_kv_heads"]
    return f"{shared} key and value heads of {spec['head_dim']} for {heads} query heads"


def _unused(model_type: str, config: Any) -> int:
    """Tensors of a release that are ignored: of a Keye-VL the table for packing and the pooling head (SigLIP's)."""
    if not model_type.lower().startswith("keye"):
        return 0
    d, inner = config.vision.hidden_size, config.vision.intermediate_size
    attention = 3 * d * d + 3 * d + d * d + d
    return 32768 * d + d + attention + 2 * d + 2 * d * inner + inner + d


def _licence(model_type: str, text: Any) -> Licence:
    if model_type == "qwen2_vl":
        return _QWEN2_VL.get(text.hidden_size, _PAGE)
    return _KIMI if model_type == "kimi_vl" else _PAGE


def hardware(size: int) -> str:
    """The least memory that ``size`` bytes fit, as it is sold: one card, or several of the usual 80 GB."""
    # A card never gives all of its memory to one program.
    card = next((gigabytes for gigabytes in CARDS if size <= 0.92e9 * gigabytes), None)
    if card is not None:
        return f"a GPU of {card} GB, or as much free RAM"
    return f"{math.ceil(size / (0.92 * 80e9))} GPUs of 80 GB, or as much free RAM"
