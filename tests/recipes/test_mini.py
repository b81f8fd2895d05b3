"""The recipe from nothing to a model that answers, at a size that learns nothing."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mirada import VLM, Sampling, synth

RECIPES = Path(__file__).parents[2] / "recipes"
STAGES = ("letters", "dense", "text", "projector", "reading", "all", "hold")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("mini")


def test_every_stage_runs_and_the_export_answers(recipe: ModuleType, tmp_path: Path) -> None:
    common = ["--size", "smoke", "--run", str(tmp_path), "--fonts", "builtin", "--workers", "0", "--steps", "2"]
    recipe.main(["tokenizer", *common])
    for stage in STAGES:
        recipe.main(["train", stage, *common])
    recipe.main(["export", *common, "--out", str(tmp_path / "out")])
    assert tuple(recipe.STAGES) == STAGES
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["last_stage"] == "hold" and "model.safetensors" in card["sha256"]
    vlm = VLM(tmp_path / "out")
    (tmp_path / "hold.safetensors").unlink()
    recipe.main(["train", "hold", *common, "--start", str(tmp_path / "out"), "--seed", "2", "--run", str(tmp_path / "more")])
    drawn = synth.sample("line", 1, 1, split="held", fonts="builtin")
    (output,) = vlm.generate(
        [[recipe.Message("user", (recipe.Image(drawn.image), recipe.Text(drawn.question)))]], Sampling(max_tokens=3)
    )
    assert output.error is None and output.usage.image_tokens == drawn.image.shape[0] * drawn.image.shape[1] // 28**2


def test_a_step_is_the_same_whoever_draws_it(recipe: ModuleType, tmp_path: Path) -> None:
    recipe.main(["tokenizer", "--size", "smoke", "--run", str(tmp_path)])
    settings = recipe.replace(recipe.STAGES["all"].settings, steps=9)
    renderer = recipe.load_renderer(tmp_path / "base")

    def draw(start: int):
        return recipe.Drawn("all", recipe.SIZES["smoke"], start, settings, tmp_path / "base", "builtin").draw(5, renderer)

    one, two = draw(0), draw(4)
    assert one.batch.tokens.equal(two.batch.tokens) and one.media.pixels.equal(two.media.pixels)


def test_tokenizer_has_single_digits_and_short_merges(recipe: ModuleType) -> None:
    parts = sys.modules["mini_parts"]
    tokenizer = parts.build_tokenizer(700, num_samples=2000)
    assert tokenizer.get_vocab_size() == 700
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2026").ids] == list("2026")
    plain = [token for token in tokenizer.get_vocab() if token not in parts.SPECIAL_TOKENS]
    assert max(map(len, plain)) == 3
    assert tokenizer.decode(tokenizer.encode("Größe: 3 €\n").ids) == "Größe: 3 €\n"


def test_scoring_counts_edits_over_characters(recipe: ModuleType) -> None:
    evaluation = importlib.import_module("mini_eval")
    line, scene = evaluation.TASKS[0], next(t for t in evaluation.TASKS if t.task == "scene")
    assert evaluation.score(line, "hello", "hallo!") == (2.0, 5.0)
    assert evaluation.score(scene, "red circle", "Red circle.") == (1.0, 1.0)
    assert evaluation.score(scene, "3", "4") == (0.0, 1.0)
