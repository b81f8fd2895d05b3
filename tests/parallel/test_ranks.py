"""Two processes with a share each answer as one with all of it."""

from __future__ import annotations

import json

import pytest
from parallel import ranks
from tiny import TINY, make_tiny

from mirada import VLM

pytestmark = pytest.mark.distributed
CASES = {kind: (kind, {}, "auto") for kind in TINY} | {
    "tied head": ("qwen2_vl", {"tie_word_embeddings": True}, "auto"),
    "fewer key heads than ranks": ("Keye", {"num_key_value_heads": 1}, "auto"),
    "int8 keys and values": ("qwen2_vl", {}, "int8"),
    "int8 latents": ("kimi_vl", {}, "int8"),
}
TOLERANCE = {"auto": 1e-4, "int8": 1e-2}
"""Of the largest logit. A sum in another order is another float, and may be rounded to another integer."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return {name: make_tiny(folder / name.replace(" ", "_"), kind, seed=5, **more) for name, (kind, more, _) in CASES.items()}


@pytest.fixture(scope="module")
def both(folders, tmp_path_factory):
    """What two processes made of all cases."""
    cases = {name: (str(folders[name]), kv) for name, (_, _, kv) in CASES.items()}
    made = ranks.run(tmp_path_factory.mktemp("out"), "generate_all", cases, seconds=300)
    for one in made:
        assert "error" not in one, one["traceback"]
    return [one["made"] for one in made]


def same(one, other, tolerance):
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        largest = max(map(abs, b["first"]))
        assert max(abs(x - y) for x, y in zip(a["first"], b["first"], strict=True)) < tolerance * largest, i
        if a["ids"] != b["ids"]:
            print(f"sequence {i} parts; its smallest gap is {b['gap']:.1e}")
            assert b["gap"] < 10 * tolerance, i


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_tokens_of_one(case, folders, both):
    """Text, pictures and videos, chunks of prompts, decoding together, and blocks that earlier requests left."""
    kv = CASES[case][2]
    with VLM(folders[case], device="cpu", engine={"kv": kv, "step_tokens": 24}) as vlm:
        prompts = ranks.asked(vlm)
        assert {span.kind for prompt, _ in prompts for span in prompt.spans} >= {"image"}
        alone = ranks.answers(vlm, prompts, 6)
        layers = sum(p.nbytes for p in vlm.parts.model.decoder.layers.parameters())
    made = both[0][case]
    same(made["made"], alone, TOLERANCE[kv])
    same(made["again"], alone, TOLERANCE[kv])
    assert made["layers"] < 0.75 * layers
    assert made["hits"] > 0
    assert "adapters are not divided" in made["adapter"]
    assert both[1][case] is None


def test_what_cannot_be_is_said_on_every_rank(both):
    expected = [
        "SettingsError: tensor_parallel=3, and the process group has 2 processes",
        "SettingsError: quant='int8:128' is given beside tensor_parallel",
        "SettingsError: device_map='auto' is given beside tensor_parallel",
        "NotAvailable: ",
    ]
    for made, last in zip(
        both, ("SettingsError: the first rank runs", "SettingsError: rank 1 of 2 runs no engine"), strict=True
    ):
        for said, begin in zip(made["refused"], [*expected, last], strict=True):
            assert said.startswith(begin), said
        assert "only plain weights" in made["refused"][3]


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
