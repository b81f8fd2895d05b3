"""Labels agree with pixels: each character alone is drawn again and found where its labels say."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mirada import synth
from mirada.synth import effects, glyphs, lines
from mirada.synth.fonts import BUILTIN
from mirada.synth.shapes import PALETTE, mark, shape_mask
from mirada.synth.types import CHAR_CLASS, IGNORE, Dense

TEXT = "Brown fix 27"  # no character twice


def ink_of(monkeypatch, keep: int | None, seed: int, size: int, level: float, text: str = TEXT):
    """Mask and labels of two rows of ``text``, where only character ``keep`` leaves ink (None: all)."""
    stamp = glyphs.stamp

    def one(canvas, run, x, y):
        chosen = [g if keep in (i, None) else g._replace(mask=np.zeros((0, 0), np.uint8)) for i, g in enumerate(run.glyphs)]
        stamp(canvas, glyphs.TextRun(run.text, chosen, run.edges, 0, 0, 0, 0), x, y)

    with monkeypatch.context() as patch:
        patch.setattr(lines.glyphs, "stamp", one)
        run = glyphs.lay_out(glyphs.face(BUILTIN, size), text, 0.5)
        return lines.draw_rows(random.Random(seed), [run, run], round(1.4 * size), level)


@pytest.mark.parametrize("level", [0.0, 1.0])
@pytest.mark.parametrize("size", [17, 32])
def test_characters_lie_where_their_labels_are(monkeypatch, size, level):
    seen = 0
    for seed in range(6):
        dense = ink_of(monkeypatch, None, seed, size, level)[1]
        flat = dense.char.reshape(dense.char.shape[0], -1)
        for i, char in enumerate(TEXT.replace(" ", "")):
            mask = ink_of(monkeypatch, TEXT.index(char), seed, size, level)[0]
            ink = mask.reshape(flat.shape[0], 14, flat.shape[1], 7).max((1, 3)) > 100
            labelled = flat == CHAR_CLASS[char]
            # Every column labelled so has this character's ink, at most one sub-column of side bearing beside it.
            near = ink.any(0) | np.roll(ink.any(0), 1) | np.roll(ink.any(0), -1)
            assert not (labelled.any(0) & ~near).any(), (char, seed)
            # And a character wider than two sub-columns is labelled in its middle.
            columns = np.flatnonzero(mask.max(0) > 100)
            if columns[-1] - columns[0] > 14:
                assert labelled[:, (columns[0] + columns[-1]) // 14].any(), (char, seed, i)
                seen += 1
    assert size < 20 or seen > 20


def test_rows_follow_the_ink(monkeypatch):
    labelled = []
    for seed in range(12):
        mask, dense = ink_of(monkeypatch, None, seed, 17, 1.0, TEXT.replace(" ", ""))
        flat = dense.char.reshape(dense.char.shape[0], -1)
        ink = (mask.reshape(flat.shape[0], 14, flat.shape[1], 7) > 100).any(3).sum(1)
        labelled += (flat[ink >= 4] != 0).tolist()
        assert not (flat[:, ink.sum(0) == 0][:, :1] > 0).any()
    # Four rows of ink make a label, but for the last glyph's overhang.
    assert len(labelled) > 300 and sum(labelled) / len(labelled) > 0.97


def test_tilt_turns_the_labels_with_the_ink(monkeypatch):
    """Some pictures must be tilted so that a line begins and ends on different patch rows, as its labels do."""
    tilted = 0
    for seed in range(60):
        run = glyphs.lay_out(glyphs.face(BUILTIN, 18), "nnnnnnnnnnnnnnnnnnnn")
        mask, dense = lines.draw_rows(random.Random(seed), [run], 28, 1.0)
        flat = dense.char.reshape(dense.char.shape[0], -1)
        columns = np.flatnonzero((flat > 0).any(0))
        middle = [np.flatnonzero(mask[:, k * 7 : k * 7 + 7].max(1) > 100).mean() for k in (columns[1], columns[-2])]
        first, last = (set(np.flatnonzero(flat[:, k] > 0)) for k in (columns[1], columns[-2]))
        if first != last:
            tilted += 1
            assert (min(first), max(first)) < (min(last), max(last)) if middle[0] < middle[1] else first != last
            assert (sum(first) / len(first) < sum(last) / len(last)) == (middle[0] < middle[1])
    assert tilted >= 3


def test_tilted_dots_lie_where_the_labels_are_computed(monkeypatch):
    """Two dots far apart on a tall canvas: the ink of each must be where ``label`` was told, within a pixel."""
    told, tilted = [], 0
    monkeypatch.setattr(
        lines.glyphs, "label", lambda char, text, edges, top, bottom, slope: told.append((edges, top, bottom, slope))
    )
    run = glyphs.lay_out(glyphs.face(BUILTIN, 18), ".")
    for seed in range(80):
        told.clear()
        mask, _ = lines.draw_rows(random.Random(seed), [run, run], 100, 1.0)
        ys, xs = np.nonzero(mask > 60)
        for half, (edges, top, bottom, slope) in zip((ys < ys.mean(), ys > ys.mean()), told, strict=True):
            assert xs[half].mean() + 0.5 == pytest.approx((edges[0] + edges[1]) / 2, abs=1.0), (seed, slope)
            assert ys[half].mean() + 0.5 == pytest.approx((top + bottom) / 2, abs=0.8), (seed, slope)
            tilted += abs(slope) > 0.02
    assert tilted > 10


def test_narrow_characters_take_a_column_of_their_own():
    # Centres lie at 3.5, 10.5, 17.5, 24.5. The middle span holds none, and takes the column under its middle.
    assert glyphs.owners([0.0, 11.0, 16.0, 30.0], 4) == [0, 1, 2, 2]
    assert glyphs.owners([0.0, 13.0, 17.0, 31.0], 5) == [0, 0, 1, 2, -1]
    # [4, 9) would have to take the only column of its neighbour: it goes without.
    assert glyphs.owners([0.0, 4.0, 9.0, 30.0], 4) == [0, 2, 2, 2]
    # Parts left of the canvas own nothing.
    assert glyphs.owners([-20.0, -3.0, 9.0, 30.0], 4) == [1, 2, 2, 2]


def test_lines_that_meet_in_a_patch_are_ignored():
    char = np.zeros((2, 2, 2), np.int16)
    glyphs.label(char, "A", [0.0, 28.0], 0, 8)
    assert (char[0] == CHAR_CLASS["A"]).all() and (char[1] == 0).all()
    glyphs.label(char, "B", [0.0, 28.0], 10, 28)
    assert (char[0] == IGNORE).all() and (char[1] == CHAR_CLASS["B"]).all()


@pytest.mark.parametrize("task", ["scene", "boxes", "chart"])
def test_objects_have_their_colour_and_labels(task):
    for index in range(40):
        drawn = synth.sample(task, 5, index, level=0.0, fonts="builtin")
        assert drawn.dense is not None
        for thing in drawn.facts.get("objects") or drawn.facts.get("boxes") or drawn.facts["bars"]:
            if task == "scene":
                x, y, shape = thing["x"], thing["y"], thing["shape"]
            else:
                x, y = thing["left"] + (4 if task == "boxes" else thing["width"] // 2), thing["top"] + 5
                shape = {"boxes": "box", "chart": "bar"}[task]
            assert np.abs(drawn.image[y, x].astype(int) - PALETTE[thing["colour"]]).max() <= 3
            place = y // 14, x // 14
            if task == "scene":
                assert synth.SHAPES[drawn.dense.shape[place]] == shape
                assert synth.COLOURS[drawn.dense.colour[place]] == thing["colour"]
            else:
                assert drawn.dense.shape[place] in (synth.SHAPES.index(shape), IGNORE)
            if task == "boxes":
                middle = (thing["top"] + thing["height"] // 2) // 14, (thing["left"] + thing["width"] // 2) // 14
                assert drawn.dense.box[middle] == thing["number"] + 1
                assert CHAR_CLASS[str(thing["number"])] in drawn.dense.char


def test_cover_decides_the_label():
    dense = Dense.empty(56, 56)
    mark(dense, np.full((14, 22), 255, np.uint8), 14, 14, "box", "red", 4)
    assert dense.shape[1].tolist() == [0, synth.SHAPES.index("box"), synth.SHAPES.index("box"), 0]
    dense = Dense.empty(56, 56)
    mark(dense, np.full((14, 16), 255, np.uint8), 14, 14, "box", "red", 4)  # a seventh of the second patch
    assert dense.box[1].tolist() == [0, 4, IGNORE, 0] and not dense.box[0].any()


def test_shape_masks_fill_their_outline():
    area = {shape: shape_mask(shape, 20).mean() / 255 for shape in ("square", "triangle", "star", "diamond", "cross")}
    # Share of a square with side 2r + 1: 1/2, 3 sqrt(3)/16, a five-pointed star, 0.72/2, arms of 0.72.
    for shape, share in {"square": 0.5, "triangle": 0.325, "star": 0.31, "diamond": 0.36, "cross": 0.59}.items():
        assert area[shape] == pytest.approx(share, abs=0.04), shape


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_text_keeps_the_contrast_rule(level):
    assert effects.needed_contrast(level) == pytest.approx({0.0: 9.0, 0.5: 6.25, 1.0: 3.5}[level])
    for seed in range(300):
        ink, start, end = effects.ink_and_paper(random.Random(seed), level)
        assert min(effects.contrast(ink, start), effects.contrast(ink, end)) >= effects.needed_contrast(level)
    assert effects.contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
