"""The front of synth: repeatable, right sizes, held-out things apart, and typed errors. Fonts: the one inside Pillow."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mirada import synth
from mirada.errors import SettingsError, UnknownName
from mirada.synth import words

TASKS = list(synth.TASKS)
ROOT = Path(__file__).resolve().parents[2]


def draw(task, index, split="train", **options):
    return synth.sample(task, 11, index, split, fonts="builtin", **options)


def fingerprint() -> str:
    digest = hashlib.sha256()
    for task in TASKS:
        for index in range(6):
            drawn = draw(task, index)
            assert drawn.dense is not None
            for part in (drawn.image, drawn.dense.char, drawn.dense.shape, drawn.dense.colour, drawn.dense.box):
                digest.update(part.tobytes())
            digest.update(json.dumps([drawn.question, drawn.answer, drawn.facts]).encode())
    for index in range(20):
        digest.update(repr(synth.text_sample(11, index)).encode())
    digest.update(synth.video_sample(11, 0).frames.tobytes())
    return digest.hexdigest()


def test_another_process_draws_the_same():
    code = f"import runpy; print(runpy.run_path({str(Path(__file__))!r})['fingerprint']())"
    env = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(ROOT)}
    other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=300)
    assert other.stdout.strip() == fingerprint()


def test_order_of_drawing_does_not_matter():
    first = [draw("line", i).image for i in range(5)]
    again = [draw("line", i).image for i in reversed(range(5))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("level", [0.0, 0.4, 1.0])
def test_canvas_and_labels_fit(task, level):
    for index in range(40):
        drawn = draw(task, index, level=level)
        height, width, channels = drawn.image.shape
        assert drawn.image.dtype == np.uint8 and channels == 3 and drawn.task == task
        assert height % 28 == 0 and width % 28 == 0 and height * width >= 4 * 28 * 28
        dense = drawn.dense
        assert dense is not None
        h, w = height // 14, width // 14
        assert dense.char.shape == (h, w, 2) and dense.char.dtype == np.int16
        assert dense.shape.shape == dense.colour.shape == dense.box.shape == (h, w)
        bounds = (dense.char, synth.CHARS), (dense.shape, synth.SHAPES), (dense.colour, synth.COLOURS)
        for labels, names in (*bounds, (dense.box, range(synth.NUM_BOX_CLASSES))):
            assert set(np.unique(labels)) <= {synth.IGNORE, *range(len(names))}
        assert drawn.question and drawn.answer and json.loads(json.dumps(drawn.facts)) == drawn.facts


@pytest.mark.parametrize("max_chars", [1, 2, 5, 12, 40])
def test_lines_are_as_long_as_asked(max_chars):
    lengths = [len(draw("line", i, max_chars=max_chars).answer) for i in range(150)]
    assert min(lengths) >= 1 and max(lengths) <= max_chars
    assert max(lengths) >= 0.75 * max_chars


def test_level_lengthens_lines():
    assert [synth.max_chars_at(level) for level in (0.0, 0.4, 1.0)] == [1, 17, 40]
    assert all(len(draw("line", i, level=0.0).answer) == 1 for i in range(40))


def tokens(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


@pytest.mark.parametrize("task", ["line", "paragraph", "chart"])
def test_held_words_are_never_trained_on(task):
    held = words.held_words()
    for index in range(250):
        facts = draw(task, index).facts
        drawn = facts["text"] if "text" in facts else " ".join([facts["title"], *(bar["label"] for bar in facts["bars"])])
        assert not held & set(tokens(drawn)), drawn


def test_held_words_that_come_up_by_chance_are_drawn_again(monkeypatch):
    held = sorted(words.held_words())[5]
    offered = iter([f"x-{held.upper()}9", held, "7zq7", held])
    monkeypatch.setattr(words, "_KINDS", {"random": (lambda rng, split, limit: next(offered), 1, 1)})
    assert words.line_text(random.Random(0), "train", 40) == ("7zq7", "random")
    assert words.line_text(random.Random(0), "held", 40) == (held, "random")


def test_held_split_draws_held_words():
    texts = [draw("line", i, "held", max_chars=12) for i in range(200)]
    drawn = [t.answer.lower() for t in texts if t.facts["kind"] == "word"]
    assert len(drawn) > 30 and set(drawn) <= words.held_words()


def test_about_a_tenth_of_the_words_is_held():
    everything = words.all_words()
    assert len(everything) == len(set(everything)) > 4000
    assert all(re.fullmatch("[a-z]{2,12}", word) for word in everything)
    assert 0.08 < len(words.held_words()) / len(everything) < 0.12
    assert not words.held_words() & set(words.words("train")[0])


def test_phrasings_are_many_and_apart():
    for kind, split in synth.phrasings().items():
        train, held = split["train"], split["held"]
        assert len(train) >= (25 if kind == "read" else 12) and len(held) >= 4, kind
        assert not {t.lower().rstrip("?.") for t in train} & {t.lower().rstrip("?.") for t in held}, kind


def asked(drawn) -> str:
    return drawn.question.lower().rstrip("?.")


@pytest.mark.parametrize(
    ("split", "phrasing", "used"), [("train", None, "train"), ("held", None, "held"), ("train", "held", "held")]
)
def test_questions_come_from_the_phrasing_asked_for(split, phrasing, used):
    allowed = {text.lower().rstrip("?.") for text in synth.phrasings()["read"][used]}
    assert {asked(draw("line", i, split, phrasing=phrasing)) for i in range(80)} <= allowed


def test_any_size_only_pads():
    sizes = set()
    for index in range(20):
        plain, padded = draw("scene", index), draw("scene", index, any_size=True)
        height, width, _ = plain.image.shape
        assert padded.dense is None and np.array_equal(padded.image[:height, :width], plain.image)
        sizes.add((padded.image.shape[0] % 28, padded.image.shape[1] % 28))
    assert len(sizes) > 10


@pytest.mark.parametrize("wrong", [{"level": 1.5}, {"level": -0.1}, {"max_chars": 0}, {"max_chars": 41}, {"phrasing": "test"}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(SettingsError, match=str(next(iter(wrong.values())))):
        draw("line", 0, **wrong)


def test_unknown_names_are_refused():
    with pytest.raises(SettingsError, match="valid"):
        draw("line", 0, "valid")
    with pytest.raises(UnknownName, match="'lines'"):
        draw("lines", 0)
    with pytest.raises(SettingsError, match="webfonts"):
        synth.sample("line", 0, 0, fonts="webfonts")


def test_synth_loads_without_torch():
    code = "import sys, mirada.synth; sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False, timeout=300).returncode == 0
