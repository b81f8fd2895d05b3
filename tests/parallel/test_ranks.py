"""Two processes with a share each answer as one with all of it."""

from __future__ import annotations

import json

import pytest
from parallel import ranks
from tiny import TINY, make_tiny

from mirada import VLM

pytestmark = pytest.mark.distributed
CASES = {kind: (kind, {}) for kind in TINY} | {
    "tied head": ("qwen2_vl", {"tie_word_embeddings": True}),
    "fewer key heads than ranks": ("Keye", {"num_key_value_heads": 1}),
}


def same(one, other, what):
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        largest = max(map(abs, b["first"]))
        assert max(abs(x - y) for x, y in zip(a["first"], b["first"], strict=True)) < 1e-4 * largest, (what, i)
        if a["ids"] != b["ids"]:
            print(f"{what}: sequence {i} parts; its smallest gap is {b['gap']:.1e}")
            assert b["gap"] < 1e-3, (what, i)


@pytest.mark.parametrize("kv", ("auto", "int8"))
@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_tokens_of_one(case, kv, tmp_path):
    """Text, pictures and videos, chunks of prompts, decoding together, and blocks that earlier requests left."""
    if kv == "int8" and case not in ("qwen2_vl", "kimi_vl"):
        pytest.skip("one of each kind of cache")
    kind, changes = CASES[case]
    directory = make_tiny(tmp_path / "model", kind, seed=5, **changes)
    with VLM(directory, device="cpu", engine={"kv": kv, "step_tokens": 24}) as vlm:
        prompts = ranks.asked(vlm)
        assert {span.kind for prompt, _ in prompts for span in prompt.spans} >= {"image"}
        alone = ranks.answers(vlm, prompts, 6)
        layers = sum(p.nbytes for p in vlm.parts.model.decoder.layers.parameters())
    leader, follower = ranks.run(tmp_path / "out", "generate", str(directory), kv)
    assert "error" not in leader, leader["traceback"]
    assert follower == {"made": None}, follower.get("traceback")
    made = leader["made"]
    same(made["made"], alone, "two processes")
    same(made["again"], alone, "two processes, again")
    assert made["layers"] < 0.75 * layers
    assert made["hits"] > 0


def test_what_cannot_be_is_said_on_every_rank(tmp_path):
    directory = make_tiny(tmp_path / "model", "qwen2_vl")
    leader, follower = ranks.run(tmp_path / "out", "refuse", str(directory))
    expected = [
        "SettingsError: tensor_parallel=3, and the process group has 2 processes",
        "SettingsError: quant='int8' is given beside tensor_parallel",
        "SettingsError: device_map='auto' is given beside tensor_parallel",
        "NotAvailable: ",
    ]
    for made, last in ((leader, "SettingsError: the first rank runs"), (follower, "SettingsError: rank 1 of 2 runs no engine")):
        assert "error" not in made, made["traceback"]
        for said, begin in zip(made["made"], [*expected, last], strict=True):
            assert said.startswith(begin), said
        assert "only plain weights" in made["made"][3]


def test_a_follower_whose_first_rank_is_gone_says_so(tmp_path):
    directory = make_tiny(tmp_path / "model", "qwen2_vl")
    with pytest.raises(FileNotFoundError, match=r"0\.json"):
        ranks.run(tmp_path / "out", "leave", str(directory))
    assert (directory / "left").exists()
    made = json.loads((tmp_path / "out" / "1.json").read_text())
    assert made["error"] == "RequestFailed" and "another process of this model is gone" in made["said"], made


def test_requests_fail_typed_when_a_follower_is_gone(tmp_path):
    directory = make_tiny(tmp_path / "model", "qwen2_vl")
    with pytest.raises(FileNotFoundError):
        ranks.run(tmp_path / "out", "break_off", str(directory))
    first, second = json.loads((directory / "broken.json").read_text())
    assert first.startswith("RequestFailed: another process of this model is gone"), first
    assert second.startswith("RequestFailed: "), second
