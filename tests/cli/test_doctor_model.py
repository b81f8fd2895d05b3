"""``mirada doctor --model``: what it says, what --verify finds, and the exit codes."""

from __future__ import annotations

import importlib
import json
import shutil

import pytest
import torch
from tiny import TINY, make_tiny

from mirada.cli import doctor_model
from mirada.engine import memory, place
from mirada.engine.place import Room
from mirada.models.load import load_model, save_model

CPU = torch.device("cpu")
NAMES = ["config", "weights", "tokenizer", "special ids", "template", "preprocessor", "memory", "text prompt", "picture prompt"]


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def rows(done) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(done.out)["checks"]}


def edit(file, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_facts_need_no_weights_and_no_tokenizer(mirada, copy):
    for file in copy.iterdir():
        if file.name != "config.json":
            file.unlink()
    done = mirada("doctor", "--model", copy, "--json")
    made = json.loads(done.out)
    assert done.code == 0 and made["model"]["model_type"] == "KeyeVL1_5" and "checks" not in made
    kinds = {row["weights"]: row["bytes"] for row in made["memory"]["rows"]}
    assert kinds["float32"] == 2 * kinds["bfloat16"] == 4 * made["model"]["parameters"] and kinds["int4"] < kinds["int8"]
    assert made["model"]["cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 2
    shown = " ".join(mirada("doctor", "--model", copy).out.split())
    assert f"{made['model']['parameters']:,}" in shown and "see the model page" in shown and "fits on cpu" in shown


def test_what_does_not_fit_says_by_how_much(mirada, copy, monkeypatch):
    needed = {r["weights"]: r["needed"] for r in doctor_model.describe(copy)["memory"]["rows"]}
    monkeypatch.setattr(place, "rooms", lambda: [Room(torch.device("cuda:0"), 1000), Room(CPU, needed["bfloat16"])])
    fits = {r["weights"]: r for r in doctor_model.describe(copy)["memory"]["rows"]}
    assert fits["bfloat16"]["fits"] == "cpu" and fits["float32"]["fits"] is None and "why" not in fits["bfloat16"]
    short = memory.say(needed["float32"] - needed["bfloat16"])
    assert "cuda:0 has 1.0 kB free" in fits["float32"]["why"] and f"{short} short" in fits["float32"]["why"]
    assert "does not fit" in mirada("doctor", "--model", copy).out


def test_a_licence_that_the_card_states(copy):
    assert doctor_model.describe(copy)["licence"]["name"] == "not recorded here"
    (copy / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nlicense: no\n")
    assert doctor_model.describe(copy)["licence"]["name"] == "apache-2.0"
    (copy / "README.md").write_text("license: mit\n")
    assert doctor_model.describe(copy)["licence"]["name"] == "not recorded here"


def test_of_a_hub_only_small_files_are_fetched(copy, monkeypatch):
    asked = []
    monkeypatch.setattr(
        importlib.import_module("mirada.hub.resolve"), "resolve", lambda name, weights: asked.append((name, weights)) or copy
    )
    assert doctor_model._folder("org/name", verify=False) == copy and asked == [("org/name", False)]


@pytest.mark.parametrize("model_type", TINY)
def test_a_whole_checkpoint_passes_in_every_family(mirada, tmp_path, model_type):
    done = mirada("doctor", "--model", make_tiny(tmp_path, model_type), "--verify", "--json")
    made = rows(done)
    assert done.code == 0 and list(made) == NAMES
    assert {row["status"] for row in made.values()} == {"ok"}, made
    assert "tokens" in made["picture prompt"]["found"]


@pytest.mark.parametrize(
    ("breakage", "failed", "problem"),
    [
        (lambda d: edit(d / "config.json", hiden_size=3), "config", "hiden_size"),
        (lambda d: edit(d / "config.json", intermediate_size=168), "weights", "mlp"),
        (lambda d: edit(d / "config.json", image_token_id=5), "special ids", "image_token_id 5"),
        (lambda d: edit(d / "config.json", eos_token_id=7), "special ids", "7 ends a reply"),
        (lambda d: edit(d / "preprocessor_config.json", patch_size=16), "preprocessor", "patch_size"),
        (lambda d: (d / "chat_template.json").write_text('{"chat_template": "{% if %}"}'), "template", "chat_template"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer", "tokenizer.json"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x"), "weights", "broken"),
    ],
)
def test_each_fault_is_a_row_of_its_own(mirada, copy, breakage, failed, problem):
    breakage(copy)
    done = mirada("doctor", "--model", copy, "--verify", "--json") if failed != "config" else None
    made = {c.name: c for c in doctor_model.examine(copy)}
    assert [name for name, c in made.items() if c.status == "fail"] == [failed]
    assert problem in made[failed].found and made[failed].fix
    if done is not None:
        assert done.code == 1 and rows(done)[failed]["status"] == "fail"


def test_what_hangs_on_a_failed_check_is_skipped_not_failed(copy):
    (copy / "model.safetensors").unlink()
    made = {c.name: c for c in doctor_model.examine(copy)}
    assert made["weights"].status == "fail" and made["tokenizer"].status == "ok"
    for name in ("memory", "text prompt", "picture prompt"):
        assert made[name].status == "skip" and "failed" in made[name].found


def test_too_little_memory_leaves_the_prompts_out(copy, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    made = {c.name: c for c in doctor_model.examine(copy)}
    assert made["memory"].status == "skip" and "needs about" in made["memory"].found
    assert made["text prompt"].status == "skip" and made["weights"].status == "ok"
    assert not [c for c in made.values() if c.status == "fail"]


def test_a_preprocessor_that_is_absent_is_said(copy):
    (copy / "preprocessor_config.json").unlink()
    made = {c.name: c for c in doctor_model.examine(copy)}
    assert made["preprocessor"].status == "ok" and "none is there" in made["preprocessor"].found


def test_wrong_usage(mirada):
    done = mirada("doctor", "--verify")
    assert done.code == 2 and "--model" in done.err
    assert mirada("doctor", "--model", "nothing").code == 1


def test_the_errors_of_rounding_worst_first(mirada, tiny, copy):
    model = load_model(copy)
    with torch.no_grad():
        model.decoder.layers[1].mlp.down.weight[:, ::32] *= 1000
    save_model(model, copy)
    done = mirada("doctor", "--model", copy, "--quant", "int4:64", "--json")
    found = json.loads(done.out)["matrices"]
    assert done.code == 0 and found[0]["name"] == "model.layers.1.mlp.down_proj.weight"
    assert [row["kept_exact"] for row in found] == [True] + [False] * (len(found) - 1)
    assert {row["bits"]: row["most"] for row in found} == {4: 0.25, 8: 0.05}
    shown = mirada("doctor", "--model", copy, "--quant", "int4:64").out
    assert "stays exact" in shown and "1 of them stay exact" in shown
    assert "None of them has to" in mirada("doctor", "--model", tiny, "--quant", "int8").out
    for options in (
        ["--quant", "int4"],
        ["--model", copy, "--quant", "exact"],
        ["--model", copy, "--quant", "int8", "--verify"],
    ):
        assert mirada("doctor", *options).code == 2
