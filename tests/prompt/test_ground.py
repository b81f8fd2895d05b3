"""Boxes and points in answers, as each family says them, however the answer is cut."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirada.media.coords import View
from mirada.prompt.format import KEYE_1_5, KEYE_PREVIEW, KIMI, QWEN2_VL
from mirada.prompt.ground import MOST, Grounder

PICTURE = View("image", (500, 2000), (252, 1008), (252, 1008))
OTHER = View("image", (100, 100), (112, 112), (112, 112))
CLIP = View("video", (300, 400), (168, 224), (168, 224))


def found(text, views=(PICTURE,), form=QWEN2_VL):
    return Grounder(form, views).feed(text)


def ref(name):
    return f"<|object_ref_start|>{name}<|object_ref_end|>"


def box(*numbers):
    x1, y1, x2, y2 = numbers
    return f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"


def test_a_box_with_its_label():
    text = f"Here: {ref('the cat')}{box(100, 200, 300, 400)}."
    (one,) = found(text)
    assert (one.kind, one.label, one.points) == ("box", "the cat", ((200, 100), (600, 200)))
    assert (one.media, one.index, one.size, one.resized, one.chosen) == ("image", 0, (2000, 500), (1008, 252), "only")
    assert text[one.start : one.end] == box(100, 200, 300, 400) and one.time is None


def test_one_label_for_several_boxes_and_none_for_what_stands_apart():
    text = f"{ref('cats')}{box(0, 0, 10, 10)}, {box(20, 20, 30, 30)} and {box(40, 40, 50, 50)}"
    assert [one.label for one in found(text)] == ["cats", "cats", ""]


def test_corners_are_put_in_order_and_nothing_lies_outside():
    (one,) = found(box(300, 400, -5, 2000))
    assert one.points == ((0, 200), (600, 500))


@pytest.mark.parametrize("form", [KEYE_PREVIEW, KEYE_1_5], ids=["preview", "1.5"])
def test_what_keye_has_beside_boxes(form):
    text = (
        "<|ocr_text_start|>EXIT<|ocr_text_end|><|quad_start|>(0,0),(100,0),(100,100),(0,100)<|quad_end|>"
        f"{ref('eye')}<|point_start|>(500, 500)<|point_end|><|point_start|>[[250,250],[750,750]]<|point_end|>"
    )
    made = [(one.kind, one.label, one.points) for one in found(text, form=form)]
    assert made == [
        ("polygon", "EXIT", ((0, 0), (200, 0), (200, 50), (0, 50))),
        ("point", "eye", ((1000, 250),)), ("point", "eye", ((500, 125),)), ("point", "eye", ((1500, 375),)),
    ]  # fmt: skip


@pytest.mark.parametrize("form", [KEYE_PREVIEW, KEYE_1_5], ids=["preview", "1.5"])
def test_boxes_and_outlines_as_keye_writes_them(form):
    one, two = "[100, 200, 300, 400]", "[0, 0, 10, 10]"
    (made,) = found(f"{ref('sign')}<|box_start|>[{one}]<|box_end|>", form=form)
    assert (made.kind, made.label, made.points) == ("box", "sign", ((200, 100), (600, 200)))
    text = f"{ref('sign')}<|box_start|>[{one}, {two}]<|box_end|>"
    made = found(text, form=form)
    assert [(one.kind, one.label, one.points) for one in made] == [
        ("box", "sign", ((200, 100), (600, 200))), ("box", "sign", ((0, 0), (20, 5))),
    ]  # fmt: skip
    assert {(one.start, one.end) for one in made} == {(text.index("<|box_start"), len(text))}
    corners = "[[0, 0], [100, 0], [100, 100]]"
    several = f"<|polygon_start|>[{corners}, [[1, 1], [2, 1], [2, 2]]]<|polygon_end|>"
    text = f"{ref('roof')}<|polygon_start|>[{corners}]<|polygon_end|>{several}"
    first = ((0, 0), (200, 0), (200, 50))
    assert [(one.kind, one.label, one.points) for one in found(text, form=form)] == [
        ("polygon", "roof", first), ("polygon", "roof", first), ("polygon", "roof", ((2, 0.5), (4, 0.5), (4, 1))),
    ]  # fmt: skip
    assert not found(f"<|polygon_start|>[{corners}, [[1, 1], [x]]]<|polygon_end|>", form=form)


def test_one_pair_between_the_tags_of_a_box_is_a_point():
    (made,) = found("Action: click(start_box='<|box_start|>(250,500)<|box_end|>')")
    assert (made.kind, made.points) == ("point", ((500, 250),))


KIMI_SAYS = [
    ("pyautogui.click(0.25, 0.5)", "point", "click", ((500, 250),)),
    ("pyautogui.dragTo(0.25, 0.5, duration=1)", "point", "dragTo", ((500, 250),)),
    ("(x=0.25, y=0.5)", "point", "", ((500, 250),)),
    ('{"bbox_2d": [0.5, 0.5, 0.25, 0.25], "label": "x"}', "box", "", ((500, 125), (1000, 250))),
    ('{"point_2d": [0.25, 0.5]}', "point", "", ((500, 250),)),
]


@pytest.mark.parametrize(("text", "kind", "label", "points"), KIMI_SAYS, ids=range(5))
def test_other_forms_of_kimi(text, kind, label, points):
    (made,) = found(text, form=KIMI)
    assert (made.kind, made.label, made.points) == (kind, label, points)
    assert found(text, form=QWEN2_VL) == ()
    stream = Grounder(KIMI, (PICTURE,))
    assert tuple(one for character in text for one in stream.feed(character)) == (made,)


@pytest.mark.parametrize(
    "text",
    ["pyautogui.scroll(0, 1)", "pyautogui.click(250, 500)", "click(0.25, 0.5)",
     '"bbox_2d": [1, 2, 3, 4]', '"bbox_2d": [0.1, 0.2]',
     '"point_2d": [0.1, 0.2, 0.3]', '"bbox": [0.1, 0.2, 0.3, 0.4]', "(0.25, 0.5)", "(x=2, y=0.5)"],
)  # fmt: skip
def test_what_kimi_does_not_say_so_is_text(text):
    assert found(text, form=KIMI) == ()


def test_clicks_of_kimi_are_fractions():
    text = "Action: click the button\npyautogui.click(x=0.25, y=0.5)\npyautogui.moveTo(x=.1,y=1.0, duration=2)"
    made = found(text, form=KIMI)
    assert [(one.kind, one.label, one.points) for one in made] == [
        ("point", "click", ((500, 250),)), ("point", "moveTo", ((200, 500),)),
    ]  # fmt: skip
    assert text[made[0].start : made[0].end] == "click(x=0.25, y=0.5)"
    assert not found("click(x=250, y=500)", form=KIMI) and not found(text, form=QWEN2_VL)


@pytest.mark.parametrize(
    "text",
    [
        "<|box_start|>(1,2),(3,4)", "<|box_start|>[[]]<|box_end|>", "<|box_start|>(1,2),(3,4),(5,6)<|box_end|>",
        "<|box_start|>(1,2),(a,4)<|box_end|>", "<|box_start|><|box_end|>", "(1,2),(3,4)<|box_end|>",
        "<|box_start|>(1,2),<|quad_start|>(3,4)<|box_end|>", "<|quad_start|>(1,2),(3,4)<|quad_end|>",
        "<|point_start|>(1)<|point_end|>", "<|box_start|>(1,2),(3,4)<|point_end|>", "<|box_start|>1 2 3 4e9<|box_end|>",
        "<|box_start|>" + " " * MOST + "(1,2),(3,4)<|box_end|>", "[1, 2, 3, 4]",
        "<|box_start|>(1,2),(3,99999999999)<|box_end|>",
    ],
    ids=range(14),
)  # fmt: skip
def test_what_is_no_mark_is_text(text):
    assert found(text, form=KEYE_PREVIEW) == ()
    assert len(found(text + box(1, 2, 3, 4), form=KEYE_PREVIEW)) == 1  # and what follows counts


def test_the_picture_that_was_named_counts_else_the_last():
    views = (PICTURE, OTHER, CLIP)
    half = box(0, 0, 500, 500)
    text = f"Picture 1 has {half} and {box(0, 0, 1, 1)}; in image 2 {half}. Video 1: {half}"
    made = found(text, views)
    assert [(one.media, one.index, one.points[1]) for one in made] == [
        ("image", 0, (1000, 250)), ("image", 0, (2, 0.5)), ("image", 1, (50, 50)), ("video", 0, (200, 150)),
    ]  # fmt: skip
    assert {one.chosen for one in made} == {"named"}
    (last,) = found(f"Picture 3 shows {box(0, 0, 500, 500)}", views)  # there is no third picture
    assert (last.media, last.index, last.chosen) == ("video", 0, "last")
    (chinese,) = found(f"图2中 {box(0, 0, 500, 500)}", views)
    assert (chinese.index, chinese.chosen) == (1, "named")
    (clicked,) = found("In picture 1: click(x=0.5, y=0.5)", views, KIMI)
    assert (clicked.index, clicked.points) == (0, ((1000, 250),))


def test_seconds_of_a_video():
    text = f"<|clip_time_start|>2.5,4<|clip_time_end|>{ref('ball')}{box(0, 0, 500, 500)}"
    (one,) = found(text, (CLIP,), KEYE_PREVIEW)
    assert (one.media, one.time, one.label, one.points[1]) == ("video", (2.5, 4), "ball", (200, 150))
    (still,) = found(text, (PICTURE,), KEYE_PREVIEW)
    assert still.time is None


def test_without_media_there_is_nothing_to_point_at():
    assert found(box(1, 2, 3, 4), ()) == ()


PIECES = st.sampled_from([
    "pyautogui.click(0.5, 0.25)", '"bbox_2d": [0.1, 0.2, 0.3, 0.4]', "(x=0.1, y=0.2)",
    "<|polygon_start|>[[[1,2],[3,4],[5,6]]]<|polygon_end|>",
    ref("a b"), box(1, 2, 300, 400), "<|box_start|>", "<|box_end|>", "(1,2),(3,4)", "<|point_start|>(5,6)<|point_end|>",
    "<|point_end|>", "<|clip_time_start|>1<|clip_time_end|>", " , ", " and ", "Picture 1", "image 12", "2", "<|", "<", "|>",
    "click(x=0.1, y=0.2)", "x.click(x=0.3,", "<|object_ref_start|>", " " * 600,
])  # fmt: skip


@settings(max_examples=60)
@given(st.lists(PIECES, max_size=14), st.lists(st.integers(0, 400), max_size=12), st.sampled_from([KEYE_PREVIEW, KIMI]))
def test_however_it_is_cut(pieces, cuts, form):
    text, views = "".join(pieces), (PICTURE, OTHER, CLIP)
    whole = found(text, views, form)
    by_one = Grounder(form, views)
    assert tuple(one for character in text for one in by_one.feed(character)) == whole
    cut = Grounder(form, views)
    edges = sorted({min(at, len(text)) for at in cuts} | {0, len(text)})
    assert tuple(one for a, b in pairwise(edges) for one in cut.feed(text[a:b])) == whole
    assert all(text[one.start] in '<cxp("' and text[one.end - 1] in ">),]" for one in whole)


@pytest.mark.parametrize("piece", ["<|box_start|>(1,2),", "<", "click(x=0.1", "1,2,3,4,", "a" * 30, "Picture 1 "])
def test_a_long_answer_takes_time_in_proportion(piece):
    def seconds(times):
        best = float("inf")
        for _ in range(3):
            begin = time.process_time()
            grounder = Grounder(KEYE_PREVIEW if "<" in piece else KIMI, (PICTURE,))
            for _ in range(times):
                grounder.feed(piece)
            best = min(best, time.process_time() - begin)
        return best

    seconds(100)
    assert seconds(4000) < 8 * max(seconds(1000), 1e-3)
