"""What each rank holds: every number once, read once, and together the whole model."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from parallel.together import Together, follow_all
from tiny import TINY, make_tiny, pack

from mirada import VLM
from mirada.errors import NotAvailable, SettingsError
from mirada.models.family import FAMILIES
from mirada.models.load import build, load_model, read_json
from mirada.models.sharded import cut, head_sizes, load_share, plan_of, share_bytes
from mirada.models.shards import Mapped
from mirada.parallel.plan import FIRST, WHOLE, Column, Cut, Experts, Plan, Row, Share, Units, cuts
from mirada.types import Prompt

CASES = {kind: (kind, {}) for kind in TINY} | {
    "tied head": ("qwen2_vl", {"tie_word_embeddings": True}),
    "fewer key heads than ranks": ("Keye", {"num_key_value_heads": 1}),
}
SHARES = [Share(rank, ranks) for ranks in (2, 4) for rank in range(ranks)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shares")
    return {name: make_tiny(folder / name.replace(" ", "_"), kind, seed=5, **more) for name, (kind, more) in CASES.items()}


@pytest.mark.parametrize("count", (1, 2, 3, 7, 12, 301))
def test_parts_are_next_to_each_other_and_cover_all(count):
    for ranks in (1, 2, 3, 4):
        ragged = [Units(count, "words", ragged=True).of(Share(rank, ranks)) for rank in range(ranks)]
        assert ragged[0][0] == 0 and ragged[-1][1] == count
        assert all(one[1] == other[0] for one, other in pairwise(ragged))
        assert max(end - begin for begin, end in ragged) - min(end - begin for begin, end in ragged) <= 1
        plain = Units(count, "heads")
        if count % ranks:
            with pytest.raises(SettingsError, match=f"tensor_parallel={ranks}: {count} heads cannot be divided"):
                plain.of(Share(0, ranks))
        else:
            assert [plain.of(Share(rank, ranks)) for rank in range(ranks)] == ragged


def test_fewer_heads_than_ranks_are_copied_in_blocks():
    keys = Units(2, "key/value heads", copied=True)
    assert [keys.of(Share(rank, 4)) for rank in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    with pytest.raises(SettingsError, match="2 key/value heads cannot be divided among 3"):
        keys.of(Share(0, 3))


def test_cuts_of_each_kind():
    share = Share(1, 2)
    heads, keys = Units(4, "heads"), Units(1, "key/value heads", copied=True)
    fused = cuts(Column((heads, keys, keys)), ((32, 6), (8, 6), (8, 6)), 48, share)
    assert fused == [(0, Cut(0, 16, 32)), (1, Cut(0, 0, 8)), (2, Cut(0, 0, 8))]
    assert cuts(Row(heads), ((6, 32),), 6, share) == [(0, Cut(1, 16, 32))]
    assert cuts(Experts(Units(4, "experts")), ((3, 6),) * 8, 4, share) == [(i, None) for i in range(4, 8)]
    assert cuts(WHOLE, ((3,),), 3, share) == [(0, None)] == cuts(FIRST, ((3,),), 3, Share(0, 2))
    assert cuts(FIRST, ((3,),), 3, share) == []
    with pytest.raises(SettingsError, match="names 1 matrices where there are 2"):
        cuts(Column((heads,)), ((8, 6), (8, 6)), 16, share)
    with pytest.raises(SettingsError, match=r"does not say how 'b' is divided"):
        Plan({"a": WHOLE}, (), lambda decoder, share: None).split("b")


@pytest.mark.parametrize("case", CASES)
def test_shares_hold_every_number_and_divided_ones_once(case, folders):
    """Put back in their places, the shares of all ranks are the stored tensors."""
    whole = load_model(folders[case])
    layout = FAMILIES[whole.config.model_type].layout(whole.config)
    stored = {name: place.clone() for name, place in layout.read(dict(whole.named_parameters()))}
    for ranks in (2, 4):
        counts = {name: torch.zeros(tensor.shape) for name, tensor in stored.items()}
        for share in (Share(rank, ranks) for rank in range(ranks)):
            model = load_share(folders[case], torch.float32, "cpu", share)
            parameters = dict(model.named_parameters())
            with torch.device("meta"):
                pieces = cut(build(read_json(folders[case] / "config.json"), device="meta"), layout, share)
            assert {piece.rule.parameter for piece in pieces} == set(parameters)
            for piece in pieces:
                place = piece.rule.place(parameters[piece.rule.parameter], piece.index)
                at = (
                    slice(None)
                    if piece.cut is None
                    else (slice(None),) * piece.cut.dim + (slice(piece.cut.begin, piece.cut.end),)
                )
                assert torch.equal(place, stored[piece.name][at])
                counts[piece.name][at] += 1
            assert share_bytes(folders[case], torch.float32, share) == sum(p.nbytes for p in parameters.values())
        assert all(count.min() >= 1 for count in counts.values())
        divided = [name for name in counts if any(x in name for x in ("q_proj.weight", "o_proj", "down_proj", "experts."))]
        divided = [name for name in divided if "vision" not in name and "visual" not in name]
        assert divided and all(counts[name].max() == 1 for name in divided)


@pytest.mark.parametrize("case", ("qwen2_vl", "kimi_vl"))
def test_a_rank_reads_its_rows_and_no_others(case, folders, monkeypatch):
    """Matrices cut by rows cost the bytes of the rank; those cut by columns pass once, a piece at a time."""
    whole = dict(load_model(folders[case]).named_parameters())["decoder.layers.0.mlp.gate_up.weight"].nbytes
    read: dict[str, int] = {}
    original = Mapped.chunks

    def chunks(self, stored, row_bytes=1):
        for begin, piece in original(self, stored, row_bytes):
            read[stored.name] = read.get(stored.name, 0) + piece.nbytes
            yield begin, piece

    monkeypatch.setattr(Mapped, "chunks", chunks)
    load_share(folders[case], torch.float32, "cpu", Share(1, 2))
    first = "model.layers.0" if case == "qwen2_vl" else "language_model.model.layers.0"
    assert read[f"{first}.mlp.gate_proj.weight"] * 4 == whole
    assert not any("embed_tokens" in name or "vis" in name or "projector" in name for name in read)


@pytest.mark.parametrize("ranks", (2, 4))
@pytest.mark.parametrize("case", CASES)
def test_ranks_together_compute_what_one_does(case, ranks, folders):
    """Hidden values and logits, over a cache and then one token more; every sum has the same bits on all ranks."""
    whole = load_model(folders[case])
    random = torch.Generator().manual_seed(0)
    prompts = [Prompt(tuple(torch.randint(0, 250, (n,), generator=random).tolist())) for n in (9, 5)]
    with torch.inference_mode():
        batch = pack(prompts)
        x = whole.embed(batch)
        spec = FAMILIES[whole.config.model_type].cache_spec(whole.config)
        expected = follow_all([whole], [spec], x, batch)[0]
        group = Together(ranks)
        models = [load_share(folders[case], torch.float32, "cpu", Share(rank, ranks)) for rank in range(ranks)]
        for rank, model in enumerate(models):
            group.wire(model, plan_of(model.config), head_sizes(model.config, ranks), rank)
        made = follow_all(models, [group.spec(model, spec) for model in models], x, batch)
    for hidden, _ in made:
        assert all(torch.equal(one, other) for one, other in zip(hidden, made[0][0], strict=True))
    for ours, theirs in zip((*made[0][0], *made[0][1]), (*expected[0], *expected[1]), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 2e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("kind", "ranks", "changes", "said"),
    [
        ("qwen2_vl", 3, {}, "4 heads cannot be divided among 3"),
        ("qwen2_vl", 2, {"intermediate_size": 161}, "161 inner channels cannot be divided among 2"),
        ("Keye", 4, {"num_attention_heads": 6, "hidden_size": 96}, "6 heads cannot"),
        ("kimi_vl", 8, {}, "4 heads cannot be divided among 8"),
        ("KeyeVLMoe", 2, {"n_routed_experts": 9, "n_group": 1, "topk_group": 1}, "9 experts cannot be divided among 2"),
        ("KeyeVLMoe", 2, {"moe_intermediate_size": 23}, "23 inner channels of the shared experts"),
    ],
)
def test_sizes_that_cannot_be_divided(kind, ranks, changes, said, tmp_path):
    folder = make_tiny(tmp_path / "m", kind, **changes)
    with pytest.raises(SettingsError, match=f"tensor_parallel={ranks}: {said}"):
        load_share(folder, torch.float32, "cpu", Share(0, ranks))


def test_without_a_process_group(folders):
    with pytest.raises(NotAvailable, match="tensor_parallel=2 needs a process group of 2 processes, and there is none"):
        VLM(folders["qwen2_vl"], device="cpu", tensor_parallel=2)
    with pytest.raises(NotAvailable, match="process group"):
        VLM.follow(folders["qwen2_vl"], 2, device="cpu")
    for wrong in (0, -1, True, "2"):
        with pytest.raises(SettingsError, match="is out of range"):
            VLM(folders["qwen2_vl"], device="cpu", tensor_parallel=wrong)
