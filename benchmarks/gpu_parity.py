"""Layers at their real widths in bfloat16 against float32 and against transformers: one command for a machine with a GPU.

    python benchmarks/gpu_parity.py [--device cuda] [--layers 2] [--tokens 256] [--seed 0] [--tiny]

Widths are those of Qwen2-VL-7B, Keye-VL-8B and Kimi-VL-A3B; layers are few, weights random, the vocabulary short. Of each model
the features of two pictures and the logits of a prompt with them are compared:

- *narrow*: bfloat16 against float32, same weights (rounded to bfloat16 first), same device;
- *host*: float32 on the device against float32 on the CPU;
- *cached*: prompt and ten single tokens from the cache against one pass, bfloat16;
- *eager*: attention as it is written against the kernels (and flash against them on a GPU), bfloat16;
- *peer*: float32 against transformers where it has the class (Qwen2-VL whole; DeepSeek-V3 for Kimi's decoder).

A row is the largest and the mean difference, each divided by the spread (standard deviation) of the reference, beside its
limit. Where rounding tips a near tie between experts, a token passes other experts and is another computation: such tokens are
left out, their share is the last column, and it has a limit too. The exit code is 1 if a row is above its limit.
``--tiny --device cpu`` runs the same rows on small widths.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mirada.layers.batch import Batch, MediaBatch
from mirada.layers.cache import make_cache
from mirada.layers.kinds import set_kind
from mirada.layers.moe import Router
from mirada.models.family import FAMILIES
from mirada.models.load import build

# (largest, mean) difference over the spread of the reference. bfloat16 keeps 8 bits; float32 23, summed in another order.
NARROW, WIDE = (0.25, 0.02), (2e-3, 1e-4)
OTHER_EXPERTS = 0.25
"""Share of tokens that may pass other experts (few layers, so few ties)."""
STEPS = 10
VOCAB = 2048
GRIDS = ((1, 8, 12), (1, 16, 6))
IDS = {"vision_start_token_id": 2001, "vision_end_token_id": 2002, "image_token_id": 2003, "video_token_id": 2004}
QWEN = {
    "model_type": "qwen2_vl", "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": False, "eos_token_id": 2000,
    "vocab_size": VOCAB, **IDS,
    "vision_config": {"depth": 2, "embed_dim": 1280, "hidden_size": 3584, "in_chans": 3, "mlp_ratio": 4, "num_heads": 16,
                      "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2},
}  # fmt: skip
KEYE = {
    "model_type": "KeyeVL1_5", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "max_position_embeddings": 32768, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False, "eos_token_id": 2000, "vocab_size": VOCAB, **IDS,
    "vision_config": {"hidden_size": 1152, "num_hidden_layers": 2, "num_attention_heads": 16, "intermediate_size": 4304,
                      "image_size": 384, "patch_size": 14},
}  # fmt: skip
KIMI_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408,
    "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.446,
    "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "rope_theta": 800000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "eos_token_id": 2000,
}  # fmt: skip
KIMI = {
    "model_type": "kimi_vl", "media_placeholder_token_id": 2003, "vocab_size": VOCAB, "tie_word_embeddings": False,
    "vision_config": {"model_type": "moonvit", "patch_size": 14, "num_hidden_layers": 2, "num_attention_heads": 16,
                      "hidden_size": 1152, "intermediate_size": 4304, "init_pos_emb_height": 64, "init_pos_emb_width": 64,
                      "merge_kernel_size": [2, 2]},
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One comparison."""

    model: str
    what: str
    largest: float
    mean: float
    limit: tuple[float, float]
    left_out: float = 0.0

    @property
    def good(self) -> bool:
        within = self.largest <= self.limit[0] and self.mean <= self.limit[1]  # a NaN is not
        return within and self.left_out <= OTHER_EXPERTS


@dataclass(frozen=True)
class Made:
    """What one run gave, float32 on the CPU: features [F, D], logits [T, V], and per layer of experts [T, k] those chosen."""

    features: Tensor
    logits: Tensor
    experts: list[Tensor]


def configs(layers: int, tiny: bool) -> dict[str, dict[str, Any]]:
    """Name -> config.json; ``tiny``: the same models with small widths."""
    qwen = QWEN | {"num_hidden_layers": layers}
    keye = KEYE | {"num_hidden_layers": layers}
    kimi = KIMI | {"text_config": KIMI_TEXT | {"num_hidden_layers": layers}}
    if tiny:
        small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        small |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
        qwen |= small | {"vision_config": QWEN["vision_config"] | {"embed_dim": 32, "hidden_size": 64, "num_heads": 2}}  # type: ignore
        vision = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 72}
        keye |= small | {"head_dim": 16, "vision_config": KEYE["vision_config"] | vision | {"image_size": 86}}  # type: ignore
        text = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_attention_heads": 4,
                "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "kv_lora_rank": 24,
                "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}  # fmt: skip
        kimi = KIMI | {
            "text_config": kimi["text_config"] | text,  # type: ignore
            "vision_config": KIMI["vision_config"] | vision | {"init_pos_emb_height": 8, "init_pos_emb_width": 8},  # type: ignore
        }
    return {"Qwen2-VL-7B": qwen, "Keye-VL-8B": keye, "Kimi-VL-A3B": kimi}


def make(mapping: dict[str, Any], seed: int) -> Any:
    """A model on the CPU in float32 whose weights bfloat16 holds exactly, so that only the arithmetic differs."""
    model: Any = build(mapping, torch.float32, "cpu")
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())
    return model.eval()


def inputs(mapping: dict[str, Any], tokens: int, seed: int) -> tuple[Batch, MediaBatch]:
    """Two pictures of noise, and a prompt of ``tokens`` tokens that holds their placeholders."""
    random = torch.Generator().manual_seed(seed)
    frames = mapping["vision_config"].get("temporal_patch_size", 1) if mapping["model_type"] == "qwen2_vl" else 1
    shape = (3, frames, 14, 14) if frames > 1 else (3, 14, 14)
    patches = sum(t * h * w for t, h, w in GRIDS)
    media = MediaBatch(torch.randn(patches, *shape, generator=random), GRIDS, ("image",) * len(GRIDS))
    ids = torch.randint(0, 2000, (max(tokens, patches // 4 + 16),), generator=random)
    rows = torch.cat(
        [torch.arange(h * w // 4) + 4 + (GRIDS[0][1] * GRIDS[0][2] // 4 + 4) * i for i, (_, h, w) in enumerate(GRIDS)]
    )
    ids[rows] = 2003
    for first in (rows[0], rows[GRIDS[0][1] * GRIDS[0][2] // 4]):
        ids[first - 1] = 2001
    places = torch.arange(len(ids)).expand(3, -1).contiguous()
    return Batch(ids, places, (len(ids),), feature_rows=rows), media


def outputs(model: Any, batch: Batch, media: MediaBatch, cached: bool = False) -> Made:
    """One run; ``cached``: the last tokens one by one."""
    weight = next(model.parameters())
    routers = [module for module in model.modules() if isinstance(module, Router)]
    chosen: list[list[Tensor]] = [[] for _ in routers]
    hooks = [
        router.register_forward_hook(lambda _, args, out, into=into: into.append(out[0].sort(-1).values.cpu()))
        for router, into in zip(routers, chosen, strict=True)
    ]

    def here(x: Tensor) -> Tensor:
        return x.to(weight.device)

    features = model.encode(replace(media, pixels=here(media.pixels).to(weight.dtype)))
    whole = replace(batch, tokens=here(batch.tokens), positions=here(batch.positions), feature_rows=here(batch.feature_rows))
    if not cached:
        hidden = model.forward(whole, features)
    else:
        cache = make_cache(FAMILIES[model.config.model_type].cache_spec(model.config), weight.dtype, weight.device)
        cache.allocate(0)
        count = len(batch.tokens) - STEPS
        first = replace(whole, tokens=whole.tokens[:count], positions=whole.positions[:, :count], lengths=(count,))
        parts = [model.forward(first, features, cache)]
        for at in range(count, len(batch.tokens)):
            one = Batch(whole.tokens[at : at + 1], whole.positions[:, at : at + 1], (1,), (at,), (0,))
            parts.append(model.forward(one, None, cache))
        hidden = torch.cat(parts)
    for hook in hooks:
        hook.remove()
    return Made(features.float().cpu(), model.logits(hidden).cpu(), [torch.cat(parts) for parts in chosen])


def compare(model: str, what: str, ours: Tensor, theirs: Tensor, limit: tuple[float, float], same: Tensor | None = None) -> Row:
    """``same``: bool [T], the tokens that are compared; None: all."""
    left_out = 0.0 if same is None else 1 - float(same.float().mean())
    gap, spread = (ours.double() - theirs.double()).abs(), theirs.double().std()
    if same is not None:
        gap = gap[same]
    return Row(model, what, float(gap.max() / spread), float(gap.mean() / spread), limit, left_out)


def same_experts(ours: Made, theirs: Made) -> Tensor | None:
    pairs = [(a == b).all(-1) for a, b in zip(ours.experts, theirs.experts, strict=True)]
    return torch.stack(pairs).all(0) if pairs else None


def rows(name: str, mapping: dict[str, Any], device: torch.device, tokens: int, seed: int) -> Iterator[Row]:
    batch, media = inputs(mapping, tokens, seed)
    model = make(mapping, seed)
    host = outputs(model, batch, media)
    yield from peer(name, mapping, model, batch, media, host, device)
    wide = host
    if device.type != "cpu":
        model.to(device)
        wide = outputs(model, batch, media)
        yield from _both(name, "host", wide, host, WIDE)
    model.to(device, torch.bfloat16)
    narrow = outputs(model, batch, media)
    yield from _both(name, "narrow", narrow, wide, NARROW)
    cached = outputs(model, batch, media, cached=True)
    yield compare(name, "cached logits", cached.logits, narrow.logits, NARROW, same_experts(cached, narrow))
    for kind in ("eager", "flash") if device.type == "cuda" else ("eager",):
        set_kind(model, kind)
        yield from _both(name, kind, outputs(model, batch, media), narrow, NARROW)


def _both(name: str, what: str, ours: Made, theirs: Made, limit: tuple[float, float]) -> Iterator[Row]:
    yield compare(name, f"{what} features", ours.features, theirs.features, limit)
    yield compare(name, f"{what} logits", ours.logits, theirs.logits, limit, same_experts(ours, theirs))


def peer(
    name: str, mapping: dict[str, Any], model: Any, batch: Batch, media: MediaBatch, ours: Made, device: torch.device
) -> Iterator[Row]:
    """Rows against transformers in float32 on ``device``, if it is installed and has the class."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: no rows against it (pip install 'mirada[parity]')", file=sys.stderr)
        return
    layout = FAMILIES[mapping["model_type"]].layout(model.config)
    stored = {key: value.detach() for key, value in layout.read(dict(model.named_parameters()))}
    runs: dict[str, Callable[..., Iterator[Row]]] = {"qwen2_vl": _qwen_peer, "kimi_vl": _kimi_peer}
    if mapping["model_type"] in runs:
        yield from runs[mapping["model_type"]](transformers, name, mapping, stored, batch, media, ours, device, model)


def _qwen_peer(
    transformers: Any, name: str, mapping: dict[str, Any], stored: dict[str, Tensor], batch: Batch, media: MediaBatch,
    ours: Made, device: torch.device, model: Any,
) -> Iterator[Row]:  # fmt: skip
    theirs = transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(**mapping)).eval()
    renamed = {_qwen_name(key): value for key, value in stored.items()}
    theirs.load_state_dict(renamed)
    theirs.to(device)
    grids = torch.tensor(GRIDS, device=device)
    pixels, ids = media.pixels.flatten(1).to(device), batch.tokens[None].to(device)
    made = theirs(
        input_ids=ids, pixel_values=pixels, image_grid_thw=grids, position_ids=batch.positions[:, None].to(device),
        attention_mask=torch.ones_like(ids),
    )  # fmt: skip
    yield compare(name, "peer logits", ours.logits, made.logits[0].float().cpu(), WIDE)


def _qwen_name(key: str) -> str:
    if key.startswith("visual."):
        return f"model.{key}"
    return key.replace("model.", "model.language_model.", 1)


def _kimi_peer(
    transformers: Any, name: str, mapping: dict[str, Any], stored: dict[str, Tensor], batch: Batch, media: MediaBatch,
    ours: Made, device: torch.device, model: Any,
) -> Iterator[Row]:  # fmt: skip
    text = mapping["text_config"]
    theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**text)).eval()
    prefix = "language_model."
    plain = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    wanted = theirs.state_dict()
    for layer in range(text["first_k_dense_replace"], text["num_hidden_layers"]):
        where = f"model.layers.{layer}.mlp.experts"
        if f"{where}.gate_up_proj" in wanted:  # from 5.0 on the experts of a layer are stacked
            count = range(text["n_routed_experts"])
            both = [torch.cat([plain.pop(f"{where}.{e}.{x}_proj.weight") for x in ("gate", "up")]) for e in count]
            plain[f"{where}.gate_up_proj"] = torch.stack(both)
            plain[f"{where}.down_proj"] = torch.stack([plain.pop(f"{where}.{e}.down_proj.weight") for e in count])
    theirs.load_state_dict(plain)
    theirs.to(device)
    embedded = model.embed(batch, ours.features)[None].to(device)
    made = theirs(inputs_embeds=embedded, position_ids=batch.positions[:1].to(device))
    yield compare(name, "peer logits", ours.logits, made.logits[0].float().cpu(), WIDE)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", help="one of the models, by a part of its name")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device; --device cpu --tiny runs the same rows on small widths")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"torch {torch.__version__} on {where}; {options.layers} layers, differences over the reference's spread\n")
    print(f"{'':14}{'':18}{'largest':>10}{'limit':>9}{'mean':>11}{'limit':>9}{'left out':>10}")
    bad = 0
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, mapping in configs(options.layers, options.tiny).items():
        if options.only and options.only.lower() not in name.lower():
            continue
        for row in rows(name, mapping, device, options.tokens, options.seed):
            verdict = "ok" if row.good else "TOO LARGE"
            largest, mean = (f"{row.largest:10.2e}{row.limit[0]:9.0e}", f"{row.mean:11.2e}{row.limit[1]:9.0e}")
            print(f"{row.model:14}{row.what:18}{largest}{mean}{row.left_out:10.1%}  {verdict}", flush=True)
            bad += not row.good
    print(f"\n{'all rows are within their limits' if not bad else f'{bad} rows are above their limits'}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
