"""The DeepSeek-V3 decoder: recorded outputs, a live reference, its config and the layout of its tensors."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mirada.errors import ConfigError, TensorError
from mirada.layers.batch import Batch
from mirada.layers.cache import make_cache
from mirada.layers.moe import MoE
from mirada.models import shards
from mirada.models.deepseek import DeepseekConfig, DeepseekDecoder, cache_spec, ignored, rules, text_config
from mirada.models.family import Keys
from mirada.models.layout import Layout
from mirada.models.load import load_weights
from mirada.models.vlm import VisionLanguageModel

GOLDEN = Path(__file__).parent.parent / "golden" / "kimi_vl"
PREFIX = "language_model."
# Keys that a family takes for itself.
OTHERS = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype")
# Moonshot's Kimi-VL-A3B and DeepSeek's V3, as published.
KIMI: dict[str, Any] = {
    "vocab_size": 163840, "max_position_embeddings": 131072, "hidden_size": 2048, "intermediate_size": 11264,
    "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
    "n_shared_experts": 2, "n_routed_experts": 64, "ep_size": 1, "routed_scaling_factor": 2.446, "kv_lora_rank": 512,
    "q_lora_rank": None, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "noaux_tc",
    "n_group": 1, "topk_group": 1, "num_experts_per_tok": 6, "moe_layer_freq": 1, "first_k_dense_replace": 1,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "aux_loss_alpha": 0.001, "seq_aux": True, "hidden_act": "silu",
    "initializer_range": 0.02, "rms_norm_eps": 1e-5, "pretraining_tp": 1, "use_cache": True, "rope_theta": 800000.0,
    "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
}  # fmt: skip
YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
V3 = KIMI | {
    "vocab_size": 129280, "max_position_embeddings": 163840, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5, "q_lora_rank": 1536, "n_group": 8,
    "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": YARN, "num_nextn_predict_layers": 1,
}  # fmt: skip
SMALL: dict[str, Any] = KIMI | {
    "vocab_size": 90, "max_position_embeddings": 512, "hidden_size": 48, "intermediate_size": 80,
    "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
    "v_head_dim": 10, "rms_norm_eps": 1e-6,
}  # fmt: skip
WITH_YARN = YARN | {"factor": 8.0, "original_max_position_embeddings": 64, "mscale": 0.8, "mscale_all_dim": 0.6}
CONFIGS = {
    "plain": SMALL | {"routed_scaling_factor": 1.7},
    "q_lora, 4 groups": SMALL | {
        "q_lora_rank": 20, "n_group": 4, "topk_group": 2, "n_routed_experts": 16, "n_shared_experts": 1,
        "num_experts_per_tok": 4,
    },
    "yarn, 2 groups, wide values": SMALL | {
        "rope_scaling": WITH_YARN, "rope_theta": 10000.0, "n_group": 2, "num_hidden_layers": 4, "v_head_dim": 20,
        "first_k_dense_replace": 2, "q_lora_rank": 12, "norm_topk_prob": False,
    },
}  # fmt: skip


class LanguageModel(nn.Module):
    """The decoder with its head, as a family holds it."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = DeepseekDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor, batch: Batch, cache: Any = None) -> torch.Tensor:
        return self.lm_head(self.decoder(self.decoder.embed(tokens), batch, cache))


def parsed(mapping: dict[str, Any]) -> DeepseekConfig:
    keys = Keys(mapping, "config.json: text_config")
    made = text_config(keys)
    keys.ignore(*OTHERS)
    keys.done()
    return made


def layout(config: DeepseekConfig, stored: str = "") -> Layout:
    return Layout(tuple(rules(config, stored)), ignored(config, stored))


def batch(*lengths: int, past: tuple[int, ...] = ()) -> Batch:
    past = past or (0,) * len(lengths)
    where = torch.cat([torch.arange(p, p + n) for p, n in zip(past, lengths, strict=True)])
    # Rows and columns are noise: they must not matter.
    return Batch(torch.zeros(len(where)), torch.stack((where, where * 3, where + 40)), lengths, past)


def random_model(mapping: dict[str, Any], seed: int) -> LanguageModel:
    model = LanguageModel(parsed(mapping))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=random)
            wide = 1.0 if "embed" in name or "router.weight" in name else 1.5 / p.shape[-1] ** 0.5
            p.copy_((0.3 if "router" in name else 1 + 0.2 * noise) * noise if p.ndim == 1 else noise * wide)
    return model.eval()


# ---- recorded outputs


@pytest.fixture(scope="module")
def golden() -> tuple[LanguageModel, dict[str, torch.Tensor]]:
    config = parsed(json.loads((GOLDEN / "config.json").read_text())["text_config"])
    model = LanguageModel(config)
    stored = shards.read_all([GOLDEN / "model.safetensors"])
    ours = {name: found for name, found in stored.items() if name.startswith(PREFIX)}
    assert sum(name.endswith("inv_freq") for name in ours) == 3  # wrong on purpose, and ignored
    load_weights(model, layout(config, PREFIX), ours)
    return model.eval(), load_file(GOLDEN / "case.safetensors")


@torch.no_grad()
def hidden(model: LanguageModel, case: dict[str, torch.Tensor]) -> torch.Tensor:
    """Embeddings of the recorded case, with its features in their places."""
    tokens = case["input_ids"][0]
    x = model.decoder.embed(tokens)
    return x.index_copy(0, (tokens == 395).nonzero()[:, 0], case["image_features"])


@torch.no_grad()
def test_recorded_outputs_of_pictures_and_text(golden) -> None:
    model, case = golden
    x = hidden(model, case)
    got = model.decoder(x, batch(len(x)))
    torch.testing.assert_close(got, case["hidden_last_norm"][0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(model.lm_head(got), case["logits"][0], atol=5e-5, rtol=1e-4)
    first = model.decoder.layers[0](x, model.decoder.turn(batch(len(x)).positions), batch(len(x)), None)
    torch.testing.assert_close(first, case["hidden_first"][0], atol=2e-5, rtol=1e-4)
    text = load_file(GOLDEN / "text_only.safetensors")
    tokens = text["input_ids"][0]
    torch.testing.assert_close(model(tokens, batch(len(tokens))), text["logits"][0], atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_recorded_router_choices(golden) -> None:
    model, case = golden
    seen = {}
    handle = model.decoder.layers[1].mlp.router.register_forward_hook(lambda _m, _i, out: seen.update(out=out))
    model.decoder(hidden(model, case), batch(case["input_ids"].shape[1]))
    handle.remove()
    chosen, order = seen["out"][0].sort(-1)
    assert torch.equal(chosen, case["router_l1_indices_sorted"])
    wanted = case["router_l1_weights"]
    for weights in (seen["out"][1].gather(1, order).sort(-1).values,):
        torch.testing.assert_close(weights, wanted.sort(-1).values, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_recorded_greedy_answer_from_the_cache(golden) -> None:
    model, case = golden
    cache = make_cache(cache_spec(model.config), torch.float32, "cpu")
    cache.allocate(0)
    x, past, answer = hidden(model, case), 0, []
    for _ in range(12):
        last = model.lm_head(model.decoder(x, batch(len(x), past=(past,)), cache))[-1:]
        past += len(x)
        answer.append(int(last.argmax()))
        x = model.decoder.embed(last.argmax(-1))
    assert answer == case["generated_ids"][0].tolist()
    assert cache.bytes_per_token == 3 * (32 + 8) * 4


# ---- properties


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_single_equals_cached(name: str) -> None:
    model = random_model(CONFIGS[name], 1)
    random = torch.Generator().manual_seed(5)
    lengths = (17, 1, 30)
    tokens = torch.randint(0, 90, (sum(lengths),), generator=random)
    packed = model(tokens, batch(*lengths))
    cache = make_cache(cache_spec(model.config), torch.float32, "cpu")
    for slot in range(3):
        cache.allocate(slot)
    torch.testing.assert_close(model(tokens, batch(*lengths), cache), packed, atol=1e-4, rtol=1e-4)
    for one, wanted in zip(tokens.split(lengths), packed.split(lengths), strict=True):
        torch.testing.assert_close(model(one, batch(len(one))), wanted, atol=1e-4, rtol=1e-4)
    more = torch.randint(0, 90, (9,), generator=random)
    for ahead in ((1, 1, 1), (1, 4, 1)):  # decode together, then one of them gets a chunk
        new = more[: sum(ahead)]
        got = model(new, batch(*ahead, past=lengths), cache).split(ahead)
        for slot, (part, past) in enumerate(zip(new.split(ahead), tokens.split(lengths), strict=True)):
            whole = model(torch.cat((past, part)), batch(len(past) + len(part)))
            torch.testing.assert_close(got[slot], whole[len(past) :], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_but_the_bias_learns(name: str) -> None:
    model = random_model(CONFIGS[name], 2)
    model(torch.arange(60), batch(25, 35)).logsumexp(-1).sum().backward()
    for parameter, p in model.named_parameters():
        if parameter.endswith("router.bias"):
            assert p.grad is None
        else:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, parameter


def test_positions_by_row_and_column_where_the_config_says_so() -> None:
    sections = SMALL | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    one, three = random_model(SMALL, 3), random_model(sections, 3)
    tokens, where = torch.arange(12), torch.arange(12)
    same = Batch(tokens, where.expand(3, -1), (12,))
    with torch.no_grad():
        torch.testing.assert_close(one(tokens, same), three(tokens, same))
        torch.testing.assert_close(one(tokens, batch(12)), one(tokens, same))
        assert not torch.allclose(three(tokens, batch(12)), three(tokens, same), atol=1e-2)


def test_yarn_lengthens_what_turns() -> None:
    mapping = CONFIGS["yarn, 2 groups, wide values"]
    cos, sin = random_model(mapping, 0).decoder.turn(torch.arange(20).expand(3, -1))
    scale = (0.08 * math.log(8) + 1) / (0.06 * math.log(8) + 1)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, scale**2))


def test_fresh_weights_are_sized_by_their_inputs() -> None:
    config = parsed(SMALL | {"moe_intermediate_size": 96})
    tower = nn.Module()
    tower.layers = nn.ModuleList()
    model = VisionLanguageModel(SimpleNamespace(text=config), tower, nn.Identity(), DeepseekDecoder(config))
    model.init_weights(3)
    block = model.decoder.layers[2].mlp
    depth = (2 * config.num_hidden_layers) ** -0.5
    for weight, std in (
        (block.experts.gate_up, 48**-0.5), (block.experts.down, 96**-0.5 * depth),
        (block.shared.down.weight, 192**-0.5 * depth), (block.router.weight, 48**-0.5),
    ):  # fmt: skip
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    assert block.router.bias.abs().max() == 0


# ---- config and layout


def test_released_configs_are_understood() -> None:
    kimi, v3 = parsed(KIMI), parsed(V3)
    assert kimi.yarn is None and kimi.softmax_scale == 192**-0.5 and kimi.head_dim == 192
    assert [kimi.is_moe(i) for i in (0, 1, 26)] == [False, True, True] and not v3.is_moe(2)
    assert v3.yarn is not None and v3.softmax_scale == pytest.approx(192**-0.5 * 1.8738, rel=1e-4)
    newer = {k: v for k, v in V3.items() if k not in ("rope_theta", "rope_scaling")}
    newer["rope_parameters"] = {**YARN, "rope_type": "yarn", "rope_theta": 10000.0}
    assert parsed(newer) == v3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"topk_method": "greedy"}, "topk_method='greedy'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_interleave": False}, "rope_interleave=False"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4"),
        ({"n_group": 3}, "n_group 3"),
        ({"topk_group": 2}, "topk_group 2"),
        ({"num_experts_per_tok": 65}, "num_experts_per_tok 65"),
        ({"n_group": 64, "topk_group": 8}, "8 groups of 1"),
        ({"v_head_dim": 256}, "v_head_dim 256"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: type='linear'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: key 'factor' is missing"),
        ({"rope_scaling": YARN | {"beta": 1}}, "rope_scaling: key 'beta'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, r"mrope_section \[16, 24, 24\]"),
        ({"kv_lora_rang": 512}, "'kv_lora_rang'.*'kv_lora_rank'"),
        ({"q_lora_rank": "none"}, "q_lora_rank is 'none'"),
    ],
)
def test_what_is_not_understood_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parsed(KIMI | changes)


def test_tensors_and_parameters_are_those_of_the_release() -> None:
    for mapping, stored, tensors, count in ((KIMI, PREFIX, 5344 - 27, 15_960_110_208), (V3, "", None, 671_026_419_200)):
        config = parsed(mapping)
        made = layout(config, stored)
        with torch.device("meta"):
            model = LanguageModel(parsed(mapping | {"num_hidden_layers": 4}))
        layout(model.config, stored).check_parameters({name: tuple(p.shape) for name, p in model.named_parameters()})
        shapes = {name: shape for name, (_, _, shape) in made.stored().items()}
        assert tensors is None or len(shapes) == tensors
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count
        last = f"{stored}model.layers.{config.num_hidden_layers}.embed_tokens.weight"
        assert made.ignores(last) == (mapping is V3)
        assert made.ignores(f"{stored}model.layers.3.self_attn.rotary_emb.inv_freq")


@pytest.mark.parametrize("name", CONFIGS)
def test_save_load_save_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    model, other = random_model(CONFIGS[name], 4), random_model(CONFIGS[name], 5)
    made = layout(model.config, PREFIX)
    shards.write_all(tmp_path / "a", dict(made.read(dict(model.named_parameters()))), 20_000)
    stored = shards.read_all(shards.find(tmp_path / "a"))
    assert f"{PREFIX}model.layers.2.mlp.experts.7.up_proj.weight" in stored
    load_weights(other, made, stored)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    shards.write_all(tmp_path / "b", dict(made.read(dict(other.named_parameters()))), 20_000)
    files = sorted((tmp_path / "a").iterdir())
    assert len(files) > 3
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_checkpoint_that_lacks_an_expert_is_refused() -> None:
    config = parsed(SMALL)
    made = layout(config)
    shapes = {name: shape for name, (_, _, shape) in made.stored().items()}
    made.check_stored(shapes)
    gone = copy.copy(shapes)
    del gone["model.layers.1.mlp.experts.5.down_proj.weight"]
    with pytest.raises(TensorError, match=r"lacks tensor 'model.layers.1.mlp.experts.5.down_proj.weight'"):
        made.check_stored(gone)


# ---- a live reference


@pytest.mark.reference
@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_gives_the_same_logits_and_choices(name: str, seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    mapping = CONFIGS[name]
    model = random_model(mapping, seed)
    theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**mapping, num_mtp_layers=0)).eval()
    held = theirs.state_dict()
    fused = {}
    for key, tensor in layout(model.config).read(dict(model.named_parameters())):
        if ".experts." not in key:
            held.pop(key).copy_(tensor)
    for i, layer in enumerate(model.decoder.layers):
        if isinstance(layer.mlp, MoE):
            fused[f"model.layers.{i}.mlp.experts.gate_up_proj"] = layer.mlp.experts.gate_up
            fused[f"model.layers.{i}.mlp.experts.down_proj"] = layer.mlp.experts.down
    for key, tensor in fused.items():
        held.pop(key).copy_(tensor)
    assert not held
    tokens = torch.randint(0, 90, (2, 150), generator=torch.Generator().manual_seed(seed))
    found: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(model.decoder.layers):
        if isinstance(layer.mlp, MoE):
            layer.mlp.router.register_forward_hook(lambda _m, _i, out, key=f"ours {i}": found.update({key: out[0]}))
            gate = theirs.model.layers[i].mlp.gate
            gate.register_forward_hook(lambda _m, _i, out, key=f"theirs {i}": found.update({key: out[2]}))
    got, wanted = model(tokens.flatten(), batch(150, 150)), theirs(tokens).logits.flatten(0, 1)
    assert wanted.std() > 0.3
    assert (got - wanted).abs().max() < 1e-4
    for key in [key for key in found if key.startswith("ours")]:
        assert torch.equal(found[key].sort(-1).values, found["theirs" + key[4:]].sort(-1).values)
