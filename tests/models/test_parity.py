"""``models.parity``: a run beside itself, what is planted is found where it lies, and files of other models and pictures."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from parity.golden import Case, cases, load_reference_model
from PIL import Image as pil
from tiny import TINY, make_tiny
from torch import nn

from mirada.errors import CheckpointError, MessageError, NotAvailable, TensorError
from mirada.layers.batch import Batch, MediaBatch
from mirada.media.grid import normalise
from mirada.media.prepare import prepare
from mirada.models import parity
from mirada.models.family import FAMILIES
from mirada.models.load import load_model, read_json
from mirada.models.parity import Recording
from mirada.models.parity_peer import Peer
from mirada.prompt.render import Renderer
from mirada.types import Image, Message, Text

GOLDEN = Path(__file__).parents[1] / "golden" / "keye_vl"


class Bench:
    """A tiny model with what its folder says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, load_model(folder)
        family, config = FAMILIES[self.model.config.model_type], self.model.config
        self.renderer = Renderer.from_directory(folder, family.prompt_format(config))
        self.rule = family.media_rule(config, read_json(folder / "preprocessor_config.json"))
        self.picture = parity.drawn().crop((0, 0, 104, 76))  # which every family resizes
        self.given = self.inputs()
        self.recorded = self.run()

    def inputs(self, rule=None, question=None) -> parity.Inputs:
        return parity.inputs(self.renderer, rule or self.rule, self.picture, question)

    def run(self, steps=4, **changes) -> Recording:
        given = replace(self.given, **changes)
        return parity.run(self.model, given, self.rule, "float32", steps=steps)

    def first(self) -> str | None:
        row = parity.compare(self.run(steps=1), self.recorded).first
        return None if row is None else row.stage


@pytest.fixture(scope="module", params=TINY)
def bench(request, tmp_path_factory):
    return Bench(make_tiny(tmp_path_factory.mktemp("parity"), request.param, seed=3))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return Bench(make_tiny(tmp_path_factory.mktemp("parity"), "qwen2_vl", seed=3))


@pytest.fixture(scope="module")
def kimi(tmp_path_factory):
    return Bench(make_tiny(tmp_path_factory.mktemp("parity"), "kimi_vl", seed=3))


def test_a_file_beside_its_own_model_differs_nowhere(bench, tmp_path):
    bench.recorded.save(tmp_path / "a.safetensors")
    held = Recording.load(tmp_path / "a.safetensors")
    assert dict(held.facts) == dict(bench.recorded.facts) and list(held.stages) == list(bench.recorded.stages)
    report = parity.compare(bench.run(), held)
    assert report.first is None and not report.notes and {row.largest for row in report.rows} == {0.0}
    names = [row.stage for row in report.rows]
    assert names[:4] == ["picture", "pixels", "patches", "patch embedding"] and names[-2:] == ["logits", "greedy"]
    for part, count in (("tower", len(bench.model.visual.layers)), ("decoder", len(bench.model.decoder.layers))):
        assert [name for name in names if name.startswith(f"{part} layer")] == [f"{part} layer {i}" for i in range(count)]
    assert names.index("projector") < names.index("tokens") < names.index("embeddings")


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("visual.patches.proj.weight", "patch embedding"),
        ("visual.layers.1.mlp.fc2.weight", "tower layer 1"),
        ("projector.mlp.fc1.weight", "projector"),
        ("decoder.embed.weight", "embeddings"),
        ("decoder.layers.0.attention.out.weight", "decoder layer 0"),
        ("decoder.layers.1.norm2.weight", "decoder layer 1"),
        ("decoder.norm.weight", "decoder norm"),
        ("lm_head.weight", "logits"),
    ],
)
def test_one_altered_weight_is_found_in_its_stage(qwen, kimi, path, stage):
    bench = kimi if stage.startswith("tower") else qwen
    weight = bench.model.get_parameter(path)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.003)
    try:
        assert bench.first() == stage
    finally:
        weight.data.copy_(kept)


def test_another_resize_and_another_mean_are_found_before_the_model(kimi):
    bench = kimi
    small = bench.rule.bounded(max_pixels=28 * 28 * 4)
    other = parity.run(bench.model, bench.inputs(small), small, "float32", steps=1)
    found = parity.compare(other, bench.recorded)
    assert found.first.stage == "pixels" and "beside" in found.first.note  # type: ignore[union-attr]
    shifted = replace(bench.rule, grid=replace(bench.rule.grid, mean=(0.5, 0.46, 0.4)))
    other = parity.run(bench.model, bench.inputs(shifted), shifted, "float32", steps=1)
    assert parity.compare(other, bench.recorded).first.stage == "patches"  # type: ignore[union-attr]


def test_pixels_are_the_picture_after_its_resize(bench):
    """What was cut into patches in the family's order is put together again."""
    noise = np.random.default_rng(0).integers(0, 256, (84, 112, 3), np.uint8)  # a size that no family resizes
    patches = prepare(Image(pil.fromarray(noise)), bench.rule)
    whole = parity.unfold(patches, bench.rule)
    assert torch.equal(whole[0], torch.from_numpy(noise)) and len(whole) == bench.rule.grid.frames


def test_positions_and_tokens_are_compared_exactly(qwen):
    places = qwen.given.places.clone()
    places[1, 40] += 1
    found = parity.compare(qwen.run(places=places), qwen.recorded).first
    assert found.stage == "positions" and found.note.startswith("most at [1, 40]; 1 of")


def test_what_is_no_number_is_beyond_every_limit(qwen):
    stages = dict(qwen.recorded.stages)
    stages["decoder layer 1"] = stages["decoder layer 1"].clone()
    stages["decoder layer 1"][3, 5] = float("nan")
    found = parity.compare(Recording(stages, qwen.recorded.facts), qwen.recorded).first
    assert found.stage == "decoder layer 1" and "[3, 5]" in found.note


@pytest.mark.parametrize(("gap", "within"), [(1e-6, True), (0.5, False)])
def test_greedy_tokens_may_differ_at_a_near_tie_alone(qwen, gap, within):
    stages = dict(qwen.recorded.stages)
    stages["greedy"] = stages["greedy"].clone()
    stages["greedy"][2] += 1
    other = Recording(stages, {**qwen.recorded.facts, "gaps": f"[9, 9, {gap}, 9]"})
    row = parity.compare(other, qwen.recorded).rows[-1]
    assert row.within is within and "up to token 2" in row.note


def test_what_a_layer_writes_over_its_input_does_not_reach_the_record(qwen):
    def double(module, given) -> None:
        given[0].mul_(2)

    hook = qwen.model.decoder.layers[1].register_forward_pre_hook(double)
    try:
        assert qwen.first() == "decoder layer 1"
    finally:
        hook.remove()


def test_limits_are_those_of_the_coarser_side():
    limits = parity.LIMITS
    assert parity.limit_of("exact", "float32") == limits["float32"]
    assert parity.limit_of("float32", "bfloat16") == limits["bfloat16"]
    assert parity.limit_of("int4:32", "exact") == limits["int4"] and parity.limit_of("int4:32", "int4:32") == limits["int8"]
    assert parity.limit_of("awq, as stored", "awq, as stored") == limits["float32"]
    assert parity.limit_of("awq, as stored", "float32") == limits["int4"]
    assert parity.limit_of("gptq, as stored, int8 kernels", "float32") == limits["int8"]


def test_files_of_other_models_pictures_and_questions(qwen, tmp_path, kimi):
    with pytest.raises(TensorError, match="another model: its model_type is kimi_vl"):
        parity.compare(qwen.recorded, kimi.recorded)
    asked = qwen.inputs(question="And now?")
    with pytest.raises(MessageError, match="another question"):
        parity.compare(parity.run(qwen.model, asked, qwen.rule, steps=1), qwen.recorded)
    white = parity.inputs(qwen.renderer, qwen.rule, pil.new("RGB", (104, 76), "white"))
    with pytest.raises(MessageError, match="another picture"):
        parity.compare(parity.run(qwen.model, white, qwen.rule, steps=1), qwen.recorded)
    for name, content in (("text", b"no tensors"), ("cut", b"\x10\0\0\0\0\0\0\0{}")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read as a recording"):
            Recording.load(tmp_path / name)
    with pytest.raises(CheckpointError, match="is no recording"):
        Recording.load(next(qwen.folder.glob("*.safetensors")))
    with pytest.raises(CheckpointError, match="cannot be written"):
        qwen.recorded.save(tmp_path / "nowhere" / "a.safetensors")


_NAMES = {
    "image_patch_plus_pos": "patch embedding", "image_vision_out": "tower norm", "image_projected": "projector",
    "inputs_embeds": "embeddings", "logits": "logits",
}  # fmt: skip


def _stage(name: str) -> str | None:
    for ours, theirs in (("image_vision_layer", "tower layer "), ("text_layer", "decoder layer ")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return _NAMES.get(name)


def test_the_released_code_of_keye_vl_stage_by_stage():
    """Its recorded outputs of every layer, through the same comparison; one altered layer is found."""
    model = load_reference_model(GOLDEN / "model_config.json", GOLDEN / "model_weights.safetensors")
    case = Case(model, cases(GOLDEN / "model_goldens.safetensors")["image"])
    known = {_stage(name): tensor for name, tensor in case.theirs.items() if _stage(name)}
    known = {name: x[0] if name in ("embeddings", "logits") or name.startswith("decoder") else x for name, x in known.items()}
    media = MediaBatch(case.theirs["pixel_values"], tuple(case.grids["image"]), ("image",))
    facts = parity.facts(model, "float32", "")

    def report() -> parity.Report:
        return parity.compare(Recording(parity.trace(model, media, case.batch()), facts), Recording(known, facts))

    assert len(report().rows) == len(known) == 9 and report().first is None
    with torch.no_grad():
        model.decoder.layers[1].mlp.down.weight.mul_(1.01)
    assert report().first.stage == "decoder layer 1"


# -- a peer ------------------------------------------------------------------------------------------------------------------


class _Text(nn.Module):
    def __init__(self, decoder) -> None:
        super().__init__()
        self.layers, self.norm, self._decoder = decoder.layers, decoder.norm, [decoder]

    def forward(self, position_ids, inputs_embeds):
        places = position_ids[-3:, 0]
        tokens = torch.zeros(places.shape[1], dtype=torch.int64)
        return self._decoder[0](inputs_embeds[0], Batch(tokens, places, (len(tokens),)))


class _Model(nn.Module):
    """Our modules under transformers' names, called as its Qwen2-VL calls its own."""

    def __init__(self, ours) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_token_id=ours.config.image_token_id)
        self.model = nn.Module()
        self.model.visual = nn.Module()
        self.model.visual.patch_embed, self.model.visual.blocks = ours.visual.patches, ours.visual.layers
        self.model.visual.merger = ours.projector
        self.model.language_model = _Text(ours.decoder)
        self._ours = [ours]

    @classmethod
    def from_pretrained(cls, folder, **settings):
        assert settings["attn_implementation"] == "eager" and settings["local_files_only"]
        return cls(load_model(folder))

    def forward(self, input_ids, attention_mask, pixel_values, image_grid_thw, mm_token_type_ids, use_cache):
        ours, ids = self._ours[0], input_ids[0]
        rows = (ids == self.config.image_token_id).nonzero()[:, 0]
        assert torch.equal(mm_token_type_ids[0].nonzero()[:, 0], rows)
        grid = tuple(tuple(row) for row in image_grid_thw.tolist())
        features = ours.encode(MediaBatch(pixel_values.view(-1, 3, 2, 14, 14), grid, ("image",)))  # type: ignore[arg-type]
        start, end = int(rows[0]), int(rows[-1]) + 1
        t, h, w = grid[0][0], grid[0][1] // 2, grid[0][2] // 2
        block = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (t, h, w)), indexing="ij")).flatten(1) + start
        tail = torch.arange(len(ids) - end).expand(3, -1) + int(block.max()) + 1
        places = torch.cat((torch.arange(start).expand(3, -1), block, tail), 1)
        x = ours.embed(Batch(ids, places, (len(ids),), feature_rows=rows), features)
        hidden = self.model.language_model(position_ids=places[:, None], inputs_embeds=x[None])
        return SimpleNamespace(logits=ours.logits(hidden)[None])


@pytest.fixture
def stand_in(monkeypatch, qwen):
    """A module ``transformers`` that holds what ``Peer`` asks of it."""

    class Tokenizer:
        @classmethod
        def from_pretrained(cls, folder, **settings):
            return cls()

        def apply_chat_template(self, chat, chat_template, tokenize, add_generation_prompt):
            assert chat_template == qwen.renderer.template.source and not tokenize and add_generation_prompt
            words = chat[0]["content"][1]["text"]
            return qwen.renderer.text([Message("user", [Image(pil.new("RGB", (28, 28))), Text(words)])])

        def convert_ids_to_tokens(self, token):
            return "<|image_pad|>"

        def __call__(self, text, add_special_tokens):
            made = []
            for piece, token in qwen.renderer.tokenizer.split(text):
                made += qwen.renderer.tokenizer.encode(piece) if token is None else [token]
            return {"input_ids": made}

    class Processor:
        @classmethod
        def from_pretrained(cls, folder, **settings):
            return cls()

        def __call__(self, images, return_tensors):
            made = prepare(Image(images[0]), qwen.rule)
            pixels = torch.from_numpy(normalise(made.pixels, qwen.rule.grid)).flatten(1)
            return {"pixel_values": pixels, "image_grid_thw": torch.tensor(made.grids)}

    top = ModuleType("transformers")
    top.__dict__.update(__version__="0", Qwen2VLForConditionalGeneration=_Model, AutoTokenizer=Tokenizer)
    below = ModuleType("pil")
    below.__dict__.update(Qwen2VLImageProcessorPil=Processor)
    monkeypatch.setitem(sys.modules, "transformers", top)
    monkeypatch.setitem(sys.modules, "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl", below)


def test_a_peer_is_asked_for_every_stage(qwen, stand_in):
    peer = Peer(qwen.folder, "qwen2_vl")
    theirs = peer.run(qwen.given, qwen.renderer, qwen.rule, dict(qwen.recorded.facts), steps=4)
    report = parity.compare(qwen.recorded, theirs)
    assert report.first is None and not report.notes and len(report.rows) == len(qwen.recorded.stages)
    assert theirs.facts["software"].startswith("transformers 0")
    with torch.no_grad():
        peer.model.model.visual.blocks[1].norm1.weight.mul_(1.01)
    theirs = peer.run(qwen.given, qwen.renderer, qwen.rule, dict(qwen.recorded.facts), steps=1)
    assert parity.compare(qwen.recorded, theirs).first.stage == "tower layer 1"


def test_a_peer_that_is_not_there(qwen, monkeypatch):
    with pytest.raises(NotAvailable, match="no class of its own for kimi_vl"):
        Peer(qwen.folder, "kimi_vl")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(NotAvailable, match="cannot be imported"):
        Peer(qwen.folder, "qwen2_vl")


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_transformers_itself(qwen):
    pytest.importorskip("transformers")
    theirs = Peer(qwen.folder, "qwen2_vl").run(qwen.given, qwen.renderer, qwen.rule, dict(qwen.recorded.facts), steps=4)
    report = parity.compare(qwen.recorded, theirs)
    assert report.first is None and len(report.rows) == len(qwen.recorded.stages)
