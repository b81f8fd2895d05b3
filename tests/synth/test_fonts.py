"""Font table: held-out files apart, missing packages named, other versions refused unless accepted."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

from mirada import synth
from mirada.errors import NotAvailable
from mirada.synth import fonts, glyphs
from mirada.synth.lines import pick_face
from mirada.synth.types import Options


def test_held_fonts_are_other_files_of_other_families():
    train, held = fonts.listed_fonts("train"), fonts.listed_fonts("held")
    assert len(train) >= 25 and len(held) >= 5
    assert not {f.sha256 for f in train} & {f.sha256 for f in held}
    assert not {f.name.split("-")[0].split("_")[0] for f in train} & {f.name.split("-")[0].split("_")[0] for f in held}
    assert len({f.package for f in held}) >= 5 and all(len(f.sha256) == 64 for f in (*train, *held))


def test_each_split_uses_its_own_fonts(monkeypatch):
    asked = []
    monkeypatch.setattr(glyphs, "face", lambda file, size, strict: asked.append((file, size, strict)))
    for split in ("train", "held"):
        asked.clear()
        for seed in range(50):
            pick_face(random.Random(seed), Options(split=split), 16, 20)
        assert {file for file, _, _ in asked} <= set(fonts.listed_fonts(split))
        assert {size for _, size, _ in asked} == {16, 17, 18, 19, 20} and all(strict for *_, strict in asked)


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(fonts, "FONT_ROOT", tmp_path)
    names = fonts.missing_packages()
    assert "fonts-dejavu-core" in names and "fonts-open-sans" in names
    assert "fonts-open-sans" not in fonts.missing_packages("train") and fonts.missing_packages("held")
    with pytest.raises(NotAvailable, match=r"apt-get install .*fonts-lato"):
        fonts.font_bytes(fonts.listed_fonts("train")[0], True, tmp_path)


def test_other_versions_need_consent(tmp_path):
    data = b"another version"
    (tmp_path / "Some.ttf").write_bytes(data)
    file = fonts.FontFile("fonts-some", "Some.ttf", "0" * 64)
    with pytest.raises(NotAvailable, match=r"SHA-256 .*debian-any"):
        fonts.font_bytes(file, True, tmp_path)
    assert fonts.font_bytes(file, False, tmp_path) == data
    same = fonts.FontFile("fonts-some", "Some.ttf", hashlib.sha256(data).hexdigest())
    assert fonts.font_bytes(same, True, tmp_path) == data


def test_every_font_has_every_character():
    missing = fonts.missing_packages()
    if missing:
        pytest.skip(f"needs {' '.join(missing)}")
    for file in (*fonts.listed_fonts("train"), *fonts.listed_fonts("held")):
        face = glyphs.face(file, 18)
        shapes = [face.glyph(char) for char in synth.CHARS if char]
        assert all(glyph.mask.size and glyph.advance > 1 for glyph in shapes), file.name
        # A font without a character draws the same box for all it lacks.
        assert len({glyph.mask.tobytes() for glyph in shapes}) > 85, file.name


def test_cutting_at_the_border_is_harmless():
    run = glyphs.lay_out(glyphs.face(fonts.BUILTIN, 30), "WM")
    whole = np.zeros((90, 140), np.uint8)
    glyphs.stamp(whole, run, 40, 50)
    for x, y in ((-10, 20), (40, 3), (-25, 45)):
        cut = np.zeros((40, 60), np.uint8)
        glyphs.stamp(cut, run, x, y)
        dx, dy = 40 - x, 50 - y
        window = whole[max(dy, 0) : dy + 40, max(dx, 0) : dx + 60]
        top, left = max(-dy, 0), max(-dx, 0)
        assert np.array_equal(cut[top : top + window.shape[0], left : left + window.shape[1]], window) and cut.any()
