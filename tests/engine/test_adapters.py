"""Adapters in the engine: each request by its own, equal to merged weights, alone or in company, and never another's cache."""

from __future__ import annotations

import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from engine.conftest import MODEL_TYPES
from engine.mixes import mix, patched, plain_logits, recorded
from safetensors.torch import load_file, save_file
from tiny_adapters import make_adapter, merged, where

from mirada import VLM
from mirada.errors import CheckpointError, ConfigError, MiradaError, SettingsError, TensorError
from mirada.types import Image, Message, Prompt, Sampling, Span, Text

GREEDY = Sampling(max_tokens=4, ignore_eos=True)
TOLERANCE = 1e-5
"""Of the largest logit, between an adapter and its merged weights."""
NAMES = ("a", "b", "c")


def seen_by_pictures(name: str) -> bool:
    return not any(part in name for part in ("lm_head", ".layers.")) or "vision" in name


@pytest.fixture(scope="module")
def folders(tiny_directories, tmp_path_factory):
    """Per model type: three adapters, of everything, of the language model, and of tower and projector."""
    made = {}
    for kind, directory in tiny_directories.items():
        with VLM(directory, device="cpu") as vlm:
            model = vlm.parts.model
        folder = tmp_path_factory.mktemp("adapters") / kind
        made[kind] = {
            "a": make_adapter(folder / "a", model, 1),
            "b": make_adapter(folder / "b", model, 2, lambda name: not seen_by_pictures(name), use_rslora=True),
            "c": make_adapter(folder / "c", model, 3, seen_by_pictures, r=3, lora_alpha=4),
        }
    return made


@pytest.fixture(scope="module")
def adapted(tiny_directories, folders):
    """Engines with all three."""
    made = {kind: VLM(directory, device="cpu", adapters=folders[kind]) for kind, directory in tiny_directories.items()}
    yield made
    for vlm in made.values():
        vlm.close()


def ask(vlm: VLM, asked, adapters):
    """Tokens and logits of each of ``asked``, all in the engine together."""
    with recorded(vlm) as seen:
        handles = [vlm.submit(p, GREEDY, media=m, adapter=name) for (p, m), name in zip(asked, adapters, strict=True)]
        outputs = [handle.result() for handle in handles]
    for output in outputs:
        assert output.error is None, output.error
    return [output.tokens for output in outputs], [torch.stack(seen[prompt.tokens]) for prompt, _ in asked]


def ask_at_once(vlm: VLM, asked, adapters):
    """``ask``, from empty caches, with all of ``asked`` admitted in one step, and no clock to say what a step may hold: every
    forward is then of the same sequences."""
    vlm.forget()
    engine = vlm._engine.engine
    scheduler, admit = engine.scheduler, engine.scheduler.admit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "admit", lambda: admit() if scheduler.running or len(scheduler.waiting) == len(asked) else [])
        patch.setattr(engine.pace, "seconds", None)
        patch.setattr(engine.encoder, "sliced", False)
        return ask(vlm, asked, adapters)


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return float((one - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_equals_merged_weights(kind, adapted, folders):
    """Of every matrix of tower, projector, decoder, experts and head, at prefill and at every step of decoding."""
    vlm = adapted[kind]
    asked = [one for one in mix(vlm, 3, 6) if one[1]][:2]
    plain = VLM.from_parts(vlm.parts.model, vlm.parts.renderer, vlm.parts.rule)
    for name in NAMES if kind in ("qwen2_vl", "kimi_vl") else NAMES[:1]:
        tokens, logits = ask(vlm, asked, [name] * len(asked))
        other = VLM.from_parts(merged(vlm.parts.model, folders[kind][name]), vlm.parts.renderer, vlm.parts.rule)
        for ours, theirs, base in zip(
            logits, plain_logits(other, asked, tokens), plain_logits(plain, asked, tokens), strict=True
        ):
            assert close(ours, theirs)
            assert not close(ours, base, 1e-2), "the adapter changes nothing, so nothing was compared"


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_three_adapters_and_none_together_equal_one_by_one(kind, adapted):
    vlm = adapted[kind]
    asked = mix(vlm, 21, 5)
    names = ["a", None, "b", "c", "a"]
    tokens, logits = ask(vlm, asked, names)
    for one, name, ids, rows in zip(asked, names, tokens, logits, strict=True):
        alone, alone_rows = ask(vlm, [one], [name])
        assert alone[0] == ids and close(alone_rows[0], rows)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_requests_without_an_adapter_are_answered_as_if_there_were_none(kind, adapted, engines):
    asked = mix(adapted[kind], 5, 5)
    tokens, logits = ask_at_once(adapted[kind], asked, [None] * 5)
    other_tokens, others = ask_at_once(engines[kind], asked, [None] * 5)
    assert tokens == other_tokens
    assert all(torch.equal(one, other) for one, other in zip(logits, others, strict=True))


@pytest.mark.parametrize("kind", ("qwen2_vl", "KeyeVL1_5"))
def test_rows_without_an_adapter_keep_every_bit_beside_rows_with_one(kind, adapted, monkeypatch):
    """Where both are computed by the same operations: few tokens in one compiled call are others."""
    vlm = adapted[kind]
    monkeypatch.setattr(vlm.parts.model.decoder.steps, "on", False)
    asked = mix(vlm, 33, 4)
    _, plain = ask_at_once(vlm, asked, [None] * 4)
    _, beside = ask_at_once(vlm, asked, [None, "a", None, "b"])
    for index in (0, 2):
        assert torch.equal(plain[index], beside[index])
    assert not torch.equal(plain[1], beside[1])


def test_the_model_is_as_it_was_afterwards(adapted):
    """No hook, no changed module, and the compiled step is back."""
    for kind in ("qwen2_vl", "kimi_vl"):
        vlm = adapted[kind]
        ask(vlm, mix(vlm, 2, 2), ["a", None])
        for module in vlm.parts.model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
            assert getattr(module, "adapted", None) is None and not getattr(module, "variants", ())


def test_chats_name_their_adapter_by_every_door(adapted, picture):
    vlm = adapted["qwen2_vl"]
    chat = [Message("user", (Image(picture), Text("what?")))]
    outputs = vlm.generate([chat] * 4, GREEDY, adapter=[None, *NAMES])
    texts = [output.message.text for output in outputs]
    assert len({output.tokens for output in outputs}) > 2
    for name, text in zip((None, *NAMES), texts, strict=True):
        assert vlm.ask(picture, "what?", max_tokens=4, ignore_eos=True, adapter=name) == text
        assert "".join(delta.text for delta in vlm.stream(chat, GREEDY, adapter=name)) == text
    assert vlm.generate([chat] * 2, GREEDY, adapter="b")[1].tokens == outputs[2].tokens


# ---- caches


def keyed(vlm: VLM, seed: int):
    """A long prompt with one picture whose blocks and features can be kept."""
    config = vlm.parts.model.config
    random = np.random.default_rng(seed)
    grid = (1, 8, 8)
    span = Span("image", 4, grid, 0)
    prompt = Prompt((5, 6, 7, 8, *[config.image_token_id] * span.num_tokens, *random.integers(0, 250, 60).tolist()), (span,))
    prompt, media = patched(random, prompt, [grid], vlm.parts.rule.grid.frames)
    media = [vlm._requests._keyed(item) for item in media]
    from dataclasses import replace

    return replace(prompt, spans=(replace(span, hash=media[0].key),)), media


@pytest.mark.parametrize("kind", ("qwen2_vl", "kimi_vl"))
def test_nothing_kept_for_one_adapter_answers_another(kind, adapted):
    """Keys and values of each apart; features of a picture are shared with those that leave tower and projector alone."""
    vlm = adapted[kind]
    vlm.forget()
    one = keyed(vlm, 9)
    first = {}
    for name in (None, *NAMES):
        before = vlm.stats()
        first[name] = ask(vlm, [one], [name])
        after = vlm.stats()
        assert after["prefix_cache_hits"] == before["prefix_cache_hits"]
        encoded = after["encoded_patches"] - before["encoded_patches"]
        assert encoded == (0 if name == "b" else 64), name
    for name in (None, *NAMES):
        before = vlm.stats()
        tokens, logits = ask(vlm, [one], [name])
        after = vlm.stats()
        assert after["prefix_cache_hits"] == before["prefix_cache_hits"] + 1
        assert tokens == first[name][0] and close(logits[0], first[name][1][0])


def test_another_adapter_under_the_same_name_finds_nothing_of_the_first(adapted, folders):
    vlm = adapted["qwen2_vl"]
    one = keyed(vlm, 10)
    vlm.load_adapter("mine", folders["qwen2_vl"]["a"])
    first = ask(vlm, [one], ["mine"])
    vlm.unload_adapter("mine")
    vlm.load_adapter("mine", folders["qwen2_vl"]["c"])
    before = vlm.stats()["prefix_cache_hits"]
    second = ask(vlm, [one], ["mine"])
    assert vlm.stats()["prefix_cache_hits"] == before
    assert not close(first[1][0][:1], second[1][0][:1], 1e-2)
    vlm.unload_adapter("mine")


# ---- loading, unloading


def test_unloading_lets_requests_end_and_then_frees(adapted, folders):
    vlm = adapted["qwen2_vl"]
    vlm.load_adapter("brief", folders["qwen2_vl"]["a"])
    gone = weakref.ref(vlm._adapters.find("brief"))
    one = mix(vlm, 40, 1)[0]
    expected = ask(vlm, [one], ["a"])[0][0]
    handle = vlm.submit(one[0], GREEDY, media=one[1], adapter="brief")
    vlm.unload_adapter("brief")
    assert handle.result().tokens == expected
    assert "brief" not in vlm.adapters
    failed = vlm.submit(one[0], GREEDY, media=one[1], adapter="brief").result()
    assert isinstance(failed.error, SettingsError) and "'brief'" in str(failed.error)
    assert vlm._engine.wait_idle(10)
    gc.collect()
    assert gone() is None


def test_names(adapted, folders):
    vlm = adapted["qwen2_vl"]
    assert vlm.adapters == NAMES
    for call, said in (
        (lambda: vlm.load_adapter("a", folders["qwen2_vl"]["b"]), "'a' already"),
        (lambda: vlm.load_adapter("", folders["qwen2_vl"]["b"]), "at least one letter"),
        (lambda: vlm.unload_adapter("d"), "known: a, b, c"),
        (lambda: vlm.ask("hello", adapter="d"), "no adapter 'd'"),
        (lambda: vlm.generate(["x"], adapter=["a", "b"]), "2 adapters for 1 chats"),
    ):
        with pytest.raises(MiradaError, match=said):
            call()


# ---- adapters that do not fit


def change_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def change_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


Q = "base_model.model.model.layers.0.self_attn.q_proj"
V = "base_model.model.visual.blocks.1.attn.qkv"
BAD = {
    "wrong rank": (lambda f: change_config(f, r=3), TensorError, r"lora_A.weight' has shape \[2, .*expected \[3, "),
    "wrong shape": (
        lambda f: change_tensors(f, lambda t: t.update({f"{V}.lora_B.weight": torch.zeros(95, 2)})),
        TensorError, r"visual.blocks.1.attn.qkv.lora_B.weight' has shape \[95, 2\], expected \[96, 2\]",
    ),
    "missing pair": (
        lambda f: change_tensors(f, lambda t: t.pop(f"{Q}.lora_B.weight")), TensorError, f"lacks tensor '{Q}.lora_B",
    ),
    "unknown target": (
        lambda f: change_tensors(f, lambda t: t.update({
            "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(2, 64),
            "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": torch.zeros(64, 2),
        })),
        TensorError, "layers.7.self_attn.q_proj.lora_A.weight' finds no place",
    ),
    "unknown in the tower": (
        lambda f: change_tensors(f, lambda t: t.update({
            "base_model.model.visual.blocks.0.attn.q.lora_A.weight": torch.zeros(2, 32),
            "base_model.model.visual.blocks.0.attn.q.lora_B.weight": torch.zeros(32, 2),
        })),
        TensorError, "visual.blocks.0.attn.q.lora_A.weight' finds no place",
    ),
    "a norm": (
        lambda f: change_tensors(f, lambda t: t.update({
            "base_model.model.visual.merger.ln_q.lora_A.weight": torch.zeros(2, 32),
            "base_model.model.visual.merger.ln_q.lora_B.weight": torch.zeros(32, 2),
        })),
        TensorError, "ln_q.lora_A.weight' changes 'visual.merger.ln_q.weight', which is no matrix",
    ),
    "an embedding": (
        lambda f: change_tensors(f, lambda t: t.update({
            "base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 9),
        })),
        TensorError, "lora_embedding_A', which belongs to no LoRA pair",
    ),
    "a saved module": (
        lambda f: change_tensors(f, lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 9)})),
        TensorError, "'base_model.model.lm_head.weight', which belongs to no LoRA pair",
    ),
    "a changed head": (
        lambda f: change_tensors(f, lambda t: t.update({"base_model.model.lm_head.base_layer.weight": torch.zeros(300, 64)})),
        TensorError, "a matrix of its own for 'lm_head.weight', which is not the model's",
    ),
    "a copy alone": (
        lambda f: change_tensors(f, lambda t: t.update({"base_model.model.visual.x.base_layer.weight": torch.zeros(3, 6)})),
        TensorError, "'base_model.model.visual.x.base_layer.weight', which belongs to no LoRA pair",
    ),
    "another prefix": (
        lambda f: change_tensors(f, lambda t: t.update({"model.lm_head.lora_A.weight": torch.zeros(2, 9)})),
        TensorError, "'model.lm_head.lora_A.weight', which belongs to no LoRA pair",
    ),
    "twice": (
        lambda f: change_tensors(f, lambda t: t.update({
            Q.replace("model.layers", "model.language_model.layers") + f".lora_{side}.weight": t[f"{Q}.lora_{side}.weight"] + 0
            for side in "AB"
        })),
        TensorError, "holds 'model.layers.0.self_attn.q_proj.weight' twice",
    ),
    "not finite": (
        lambda f: change_tensors(f, lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan"))),
        TensorError, "q_proj.lora_A.weight' holds values",
    ),
    "integers": (
        lambda f: change_tensors(f, lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].to(torch.int8)})),
        TensorError, "lora_A.weight' is stored as I8",
    ),
    "targets of another": (
        lambda f: change_config(f, target_modules=["k_proj"]), TensorError, "weight', which target_modules does not name",
    ),
    "empty": (lambda f: save_file({}, f / "adapter_model.safetensors"), TensorError, "holds no tensors"),
    "cut": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
        TensorError, "is broken",
    ),
    "dora": (lambda f: change_config(f, use_dora=True), ConfigError, "use_dora=True is not supported"),
    "another method": (lambda f: change_config(f, peft_type="LOHA"), ConfigError, "peft_type 'LOHA' is not supported"),
    "saved modules": (lambda f: change_config(f, modules_to_save=["lm_head"]), ConfigError, "modules_to_save="),
    "biases": (lambda f: change_config(f, bias="all"), ConfigError, "bias='all' is not supported"),
    "weights taken out": (lambda f: change_config(f, init_lora_weights="pissa"), ConfigError, "init_lora_weights='pissa'"),
    "unknown key": (lambda f: change_config(f, use_magic=True), ConfigError, "key 'use_magic' is not understood"),
    "no rank": (lambda f: change_config(f, r=0), ConfigError, "a rank is 0"),
    "no expression": (lambda f: change_config(f, target_modules="("), ConfigError, "is not a regular expression"),
    "no number": (lambda f: change_config(f, rank_pattern={"q_proj": "2"}), ConfigError, "rank_pattern of 'q_proj' is '2'"),
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        CheckpointError, r"pickle \(adapter_model.bin\)",
    ),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), CheckpointError, "holds no adapter"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), ConfigError, "adapter_config.json is missing"),
    "no directory": (lambda f: shutil.rmtree(f), CheckpointError, "is not a directory"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_an_adapter_that_does_not_fit_is_refused_by_name(name, adapted, folders, tmp_path):
    vlm, folder = adapted["qwen2_vl"], tmp_path / "adapter"
    spoil, kind, said = BAD[name]
    shutil.copytree(folders["qwen2_vl"]["a"], folder)
    spoil(folder)
    with pytest.raises(kind, match=said):
        vlm.load_adapter("bad", folder)
    assert vlm.adapters == NAMES


def test_an_adapter_of_the_router_is_refused(adapted, tmp_path):
    """It is no linear layer in the release."""
    vlm = adapted["kimi_vl"]
    folder = make_adapter(tmp_path / "r", vlm.parts.model, 1, lambda name: name.endswith("layers.1.self_attn.o_proj.weight"))
    x = "base_model.model.language_model.model.layers.1.mlp.gate"
    change_tensors(
        folder, lambda t: t.update({f"{x}.lora_A.weight": torch.zeros(2, 64), f"{x}.lora_B.weight": torch.zeros(4, 2)})
    )
    with pytest.raises(TensorError, match=r"mlp.gate.lora_A.weight' changes .*gate.weight', which is no matrix"):
        vlm.load_adapter("bad", folder)


def test_every_matrix_of_every_family_has_its_place(adapted):
    """Whatever the layouts call a matrix of a linear layer or of an expert, adapters may change it."""
    for vlm in adapted.values():
        model = vlm.parts.model
        linear = {f"{path}.weight" for path, module in model.named_modules() if hasattr(module, "in_features")}
        stacks = {name for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name}
        reached = {path if index is not None else f"{path}.weight" for path, index in (t.place for t in where(model).values())}
        assert reached == linear | stacks


# ---- names of other software, patterns, quantised models


def test_names_that_later_transformers_save(adapted, folders, tmp_path):
    def later(module: str) -> str:
        for begin, other in (("visual.", "model.visual."), ("model.", "model.language_model.")):
            if module.startswith(begin):
                return other + module.removeprefix(begin)
        return module

    vlm = adapted["qwen2_vl"]
    folder = make_adapter(tmp_path / "later", vlm.parts.model, 1, rename=later)
    assert set(load_file(folder / "adapter_model.safetensors")) != set(
        load_file(folders["qwen2_vl"]["a"] / "adapter_model.safetensors")
    )
    vlm.load_adapter("later", folder)
    assert vlm._adapters.find("later").key == vlm._adapters.find("a").key
    vlm.unload_adapter("later")


def test_a_tied_head_takes_an_adapter_and_the_embedding_does_not(tmp_path):
    from tiny import make_tiny

    with VLM(make_tiny(tmp_path / "m", "qwen2_vl", tie_word_embeddings=True), device="cpu") as vlm:
        model = vlm.parts.model
        vlm.load_adapter("head", make_adapter(tmp_path / "h", model, 4, lambda name: name == "lm_head.weight"))
        one = mix(vlm, 1, 1)
        logits = ask(vlm, one, ["head"])[1]
        _, base = ask(vlm, one, [None])
        found = vlm._adapters.find("head").patches["lm_head", None]
        hidden = torch.linalg.lstsq(model.lm_head.weight.double(), base[0][0].double()).solution
        expected = base[0][0].double() + found.merged(torch.zeros_like(model.lm_head.weight)).double() @ hidden
        assert (logits[0][0] - expected).abs().max() < 1e-3 * base[0].abs().max()


@pytest.mark.parametrize("quant", ("int8", "exact"))
def test_beside_matrices_in_another_form(quant, tiny_directories, folders):
    """The adapter is added to what the quantised model gives."""
    from mirada.layers.kernels import library

    if library.library() is None:
        pytest.skip("no compiled kernels")
    kind = "kimi_vl"
    with VLM(tiny_directories[kind], device="cpu", quant=quant, adapters=folders[kind]) as vlm:
        asked = mix(vlm, 12, 3)
        logits = ask(vlm, asked, ["a", None, "b"])[1]
        wide = VLM(tiny_directories[kind], device="cpu", adapters=folders[kind])
        others = ask(wide, asked, ["a", None, "b"])[1]
        wide.close()
        for mine, theirs, name in zip(logits, others, "a-b", strict=True):
            assert close(mine[:1], theirs[:1], 0.1), name
