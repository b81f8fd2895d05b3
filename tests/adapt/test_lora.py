"""LoRA: settings as PEFT reads them, names in pairs, and products added to the right rows."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mirada.adapt.lora import Adapted, Adapter, LoraConfig, Patch, Rows, pairs, patch, read_config
from mirada.errors import ConfigError, TensorError

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def test_scales_and_ranks_by_pattern():
    """``get_pattern_key``: a pattern is matched against the end of the name, the first that matches holds."""
    config = read_config(
        PLAIN | {
            "rank_pattern": {"layers.0.self_attn.q_proj": 4, r"mlp\..*": 2},
            "alpha_pattern": {"^visual.*": 1, "q_proj": 3.0},
        }
    )  # fmt: skip
    assert (config.rank("model.layers.0.self_attn.q_proj"), config.scale("model.layers.0.self_attn.q_proj")) == (4, 0.75)
    assert (config.rank("model.layers.10.self_attn.q_proj"), config.scale("model.layers.10.self_attn.q_proj")) == (8, 0.375)
    assert (config.rank("model.layers.3.mlp.up_proj"), config.scale("model.layers.3.mlp.up_proj")) == (2, 8.0)
    assert (config.rank("visual.blocks.0.attn.qkv"), config.scale("visual.blocks.0.attn.qkv")) == (8, 0.125)
    assert read_config(PLAIN | {"use_rslora": True}).scale("x") == 16 / 8**0.5


def test_targets_as_peft_matches_them():
    """Endings of names at a dot; a text is an expression for the whole name."""
    ends = read_config(PLAIN | {"target_modules": ["q_proj", "layers.1.mlp.up_proj", "lm_head"]})
    assert (
        ends.covers("model.layers.0.self_attn.q_proj") and ends.covers("lm_head") and ends.covers("model.layers.1.mlp.up_proj")
    )
    assert not ends.covers("model.layers.0.self_attn.eq_proj") and not ends.covers("model.layers.11.mlp.up_proj")
    whole = read_config(PLAIN | {"target_modules": r"visual\..*\.(qkv|proj)"})
    assert whole.covers("visual.blocks.0.attn.qkv") and not whole.covers("a.visual.blocks.0.attn.qkv")
    assert not whole.covers("visual.blocks.0.attn.qkv2")
    assert read_config(PLAIN).covers("anything") and read_config(PLAIN | {"target_modules": "all-linear"}).covers("anything")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": None}, "peft_type is None"),
        ({"peft_type": "ADALORA"}, "'ADALORA' is not supported"),
        ({"r": "8"}, "r is '8'"),
        ({"r": True}, "r is True"),
        ({"rank_pattern": {"a": 0}}, "a rank is 0"),
        ({"alpha_pattern": {"(": 1}}, "not a regular expression"),
        ({"alpha_pattern": {"a": True}}, "alpha_pattern of 'a' is True"),
        ({"target_modules": 3}, "target_modules is 3"),
        *(({name: True}, f"{name}=True is not") for name in ("use_dora", "use_qalora", "fan_in_fan_out", "lora_bias")),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save="),
        ({"trainable_token_indices": [3]}, "trainable_token_indices="),
        ({"target_parameters": ["experts.gate_up"]}, "target_parameters="),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens="),
        ({"loftq_config": {"bits": 4}}, "loftq_config="),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"surprise": 1}, "key 'surprise' is not understood"),
    ],
)  # fmt: skip
def test_what_is_refused(change, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_config(PLAIN | change)


def test_pairs():
    config = LoraConfig(2, 4)
    a, b = "base_model.model.x.y.lora_A.weight", "base_model.model.x.y.lora_B.weight"
    assert pairs([b, a], config, "f") == {"x.y": (a, b)}
    for names in ([a], [b]):
        with pytest.raises(TensorError, match=r"f lacks tensor 'base_model.model.x.y.lora_[AB].weight'"):
            pairs(names, config, "f")
    for wrong in ("x.y.lora_A.weight", "base_model.model.x.y.lora_C.weight", "base_model.model.x.lora_magnitude_vector.weight"):
        with pytest.raises(TensorError, match=re.escape(repr(wrong))):
            pairs([a, b, wrong], config, "f")


def drawn(columns: int, *parts: tuple[int, int, int], seed: int = 0) -> Patch:
    """A patch of parts (start, rows, rank)."""
    random = torch.Generator().manual_seed(seed)
    return patch([(s, torch.randn(r, columns, generator=random), torch.randn(n, r, generator=random)) for s, n, r in parts])


@pytest.mark.parametrize("rows", (slice(2, 5), torch.tensor([0, 3, 4, 6])))
def test_a_patch_adds_to_its_rows_what_merging_would(rows):
    made, x, weight = drawn(6, (0, 4, 2), (7, 3, 1)), torch.randn(7, 6), torch.randn(10, 6)
    plain = F.linear(x, weight)
    out = plain.clone()
    made.add(x, out, rows)
    expected = F.linear(x, made.merged(weight))
    torch.testing.assert_close(out[rows], expected[rows])
    others = torch.ones(7, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(out[others], plain[others])
    assert torch.equal(out[:, 4:7], plain[:, 4:7]), "outputs between the parts"
    assert made.nbytes == 4 * (3 * 6 + 4 * 2 + 3)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6))
        self.lm_head = nn.Linear(6, 4)

    def forward(self, x):
        return self.lm_head(self.decoder(x)[1::2])


@torch.no_grad()
def test_several_adapters_in_one_forward_each_on_its_rows():
    model, x = Model(), torch.randn(6, 6)
    one = Adapter("1", "", {("decoder.0", None): drawn(6, (0, 10, 2)), ("lm_head", None): drawn(6, (0, 4, 1), seed=3)})
    two = Adapter("2", "", {("decoder.1", None): drawn(10, (2, 3, 2), seed=1)})
    adapted, plain = Adapted(model), model(x)
    with adapted.over({"decoder": [(one, 2), (None, 2), (two, 1), (one, 1)], "lm_head": [(one, 1), (None, 1), (one, 1)]}):
        made = model(x)
    assert torch.equal(model(x), plain) and not model.decoder[0]._forward_hooks
    assert torch.equal(made[1], plain[1]) and not torch.equal(made[0], plain[0])
    with adapted.over({"decoder": [(one, 6)], "lm_head": [(one, 3)]}):
        alone = model(x)
    torch.testing.assert_close(made[[0, 2]], alone[[0, 2]])
    with adapted.over({"decoder": [(two, 6)]}):
        assert not torch.equal(model(x)[2], made[2])


def test_rows_that_do_not_fit_the_forward_are_a_defect_and_not_an_answer():
    model = Model()
    one = Adapter("1", "", {("decoder.0", None): drawn(6, (0, 10, 2))})
    with pytest.raises(RuntimeError, match="5 rows"), Adapted(model).over({"decoder": [(one, 5)]}):
        model(torch.randn(6, 6))
    assert not model.decoder[0]._forward_hooks


def test_neighbouring_rows_of_one_adapter_are_one_slice():
    one, two = Adapter("1", "", {}), Adapter("2", "", {})
    rows = Rows([(one, 2), (one, 3), (None, 1), (two, 2), (one, 0), (two, 1)])
    cpu = torch.device("cpu")
    assert (rows.of(one, cpu), rows.of(two, cpu), rows.total) == (slice(0, 5), slice(6, 9), 9)
    assert rows.members == {one: [0, 1], two: [3, 5]}
    apart = Rows([(one, 1), (two, 2), (one, 2)])
    assert apart.of(one, cpu).tolist() == [0, 3, 4]
