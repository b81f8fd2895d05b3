"""Answers follow from the facts: a second, independent solver for every question type."""

from __future__ import annotations

import collections

import pytest

from mirada import synth


def _name(thing):
    return f"{thing['colour']} {thing['shape']}"


def _ahead(one, other, side):
    axis, sign = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}[side]
    return sign * (one[axis] - other[axis]) > 0


def _spot(thing, facts):
    row = "top " if 3 * thing["y"] < facts["height"] else "bottom " if 3 * thing["y"] > 2 * facts["height"] else ""
    column = "left" if 3 * thing["x"] < facts["width"] else "right" if 3 * thing["x"] > 2 * facts["width"] else ""
    return (row + column).strip() or "middle"


def solve_scene(kind, given, facts):
    things = facts["objects"]
    named = {_name(t): t for t in things}
    if kind.startswith("count"):
        return str(len([t for t in things if all(t[key] == value for key, value in given.items())]))
    if kind in ("colour_of", "shape_of"):
        key, wanted = ("shape", "colour") if kind == "colour_of" else ("colour", "shape")
        (only,) = [t for t in things if t[key] == given[key]]
        return only[wanted]
    if kind == "where":
        return _spot(named[given["object"]], facts)
    if kind == "what_at":
        (only,) = [t for t in things if _spot(t, facts) == given["spot"]]
        return _name(only)
    if kind == "where_each":
        return ", ".join(_spot(named[one], facts) for one in given["objects"].split(", "))
    if kind == "side_of":
        near, far = named[given["object"]], named[given["other"]]
        dx, dy = near["x"] - far["x"], near["y"] - far["y"]
        return ("left" if dx < 0 else "right") if "left" in given["sides"] else ("above" if dy < 0 else "below")
    if kind == "further":
        key, sign = {"left": ("x", -1), "right": ("x", 1), "up": ("y", -1), "down": ("y", 1)}[given["end"]]
        return max(given["object"], given["other"], key=lambda n: sign * named[n][key])
    if kind.startswith("list_"):
        return ", ".join(_name(t) for t in sorted(things, key=lambda t: t["x" if kind == "list_across" else "y"]))
    if kind == "relation":
        (only,) = [t for t in things if _ahead(t, named[given["object"]], given["side"])]
        return _name(only)
    if kind == "exists":
        return "yes" if given["object"] in named else "no"
    if kind == "compare":
        return "yes" if _ahead(named[given["object"]], named[given["other"]], given["side"]) else "no"
    key, pick = {"leftmost": ("x", min), "rightmost": ("x", max), "topmost": ("y", min), "lowest": ("y", max),
                 "largest": ("radius", max), "smallest": ("radius", min)}[given["most"]]  # fmt: skip
    return _name(pick(things, key=lambda t: t[key]))


def solve_boxes(kind, given, facts):
    boxes = facts["boxes"]
    numbers = [box["number"] for box in boxes]
    by_number = {box["number"]: box for box in boxes}
    if kind == "box_count":
        return str(len(boxes))
    if kind == "box_colour":
        return by_number[given["number"]]["colour"]
    if kind == "box_number":
        (only,) = [box["number"] for box in boxes if box["colour"] == given["colour"]]
        return str(only)
    if kind in ("box_end", "box_end_colour"):
        box = min(boxes, key=lambda b: b["top"]) if given["end"] == "top" else max(boxes, key=lambda b: b["top"])
        return str(box["number"]) if kind == "box_end" else box["colour"]
    if kind == "box_next":
        return str(numbers[numbers.index(given["number"]) + (1 if given["side"] == "below" else -1)])
    if kind == "box_compare":
        above = by_number[given["number"]]["top"] < by_number[given["other"]]["top"]
        return "yes" if above == (given["side"] == "above") else "no"
    if kind == "box_exists":
        return "yes" if given["number"] in numbers else "no"
    return ", ".join(map(str, numbers))


def solve_chart(kind, given, facts):
    bars = facts["bars"]
    by_label = {bar["label"]: bar for bar in bars}
    if kind == "chart_count":
        return str(len(bars))
    if kind == "chart_extreme":
        # The drawn bars, not the values: the tallest begins highest.
        pick = min if given["end"] == "high" else max
        return pick(bars, key=lambda b: b["top"])["label"]
    if kind == "chart_value":
        return str(by_label[given["label"]]["value"])
    if kind == "chart_which":
        (only,) = [bar["label"] for bar in bars if bar["value"] == given["value"]]
        return only
    if kind == "chart_title":
        return facts["title"]
    if kind == "chart_colour":
        return by_label[given["label"]]["colour"]
    if kind == "chart_compare":
        return "yes" if by_label[given["label"]]["top"] < by_label[given["other"]]["top"] else "no"
    return ", ".join(bar["label"] for bar in sorted(bars, key=lambda b: b["left"]))


CASES = {"scene": (solve_scene, 11), "boxes": (solve_boxes, 9), "chart": (solve_chart, 8)}


@pytest.mark.parametrize("task", CASES)
@pytest.mark.parametrize("split", ["train", "held"])
def test_answers_follow_from_the_facts(task, split):
    solve, num_kinds = CASES[task]
    kinds, yes_no = collections.Counter(), collections.Counter()
    for index in range(500):
        drawn = synth.sample(task, 8, index, split, fonts="builtin")
        kind, given = drawn.facts["question_type"], drawn.facts["question_arguments"]
        assert solve(kind, given, drawn.facts) == drawn.answer, (index, kind, given)
        for value in given.values():
            if kind != "chart_extreme" and value not in ("left of", "right of", "above", "below"):
                assert str(value) in drawn.question, drawn.question
        assert "{" not in drawn.question and " a orange" not in drawn.question
        kinds[kind] += 1
        yes_no[drawn.answer] += drawn.answer in ("yes", "no")
    assert len(kinds) == num_kinds and min(kinds.values()) >= 5
    assert 0.35 < yes_no["yes"] / (yes_no["yes"] + yes_no["no"]) < 0.65


@pytest.mark.parametrize("task", CASES)
def test_further_questions_are_about_the_same_picture(task):
    solve, _ = CASES[task]
    questions, kinds = set(), set()
    for index in range(50):
        drawn = synth.sample(task, 8, index, fonts="builtin")
        for more in synth.more_questions(drawn, 10, 8, index):
            assert more.image is drawn.image
            assert solve(more.facts["question_type"], more.facts["question_arguments"], drawn.facts) == more.answer
            questions.add(more.question)
            kinds.add(more.facts["question_type"])
    assert len(questions) > 40
    assert task != "scene" or {"what_at", "where_each", "side_of", "further", "list_across", "list_down"} <= kinds
    line = synth.sample("line", 8, 0, fonts="builtin")
    assert synth.more_questions(line, 4, 8, 0) == []


def test_scene_objects_do_not_overlap_and_lie_inside():
    for index in range(100):
        facts = synth.sample("scene", 2, index, fonts="builtin").facts
        for i, one in enumerate(facts["objects"]):
            assert one["radius"] <= one["x"] < facts["width"] - one["radius"]
            assert one["radius"] <= one["y"] < facts["height"] - one["radius"]
            for other in facts["objects"][:i]:
                gap = (one["x"] - other["x"]) ** 2 + (one["y"] - other["y"]) ** 2
                assert gap >= (one["radius"] + other["radius"]) ** 2


def test_scenes_come_in_many_sizes():
    """One that knows small shapes alone sees several in a large one."""
    facts = [synth.sample("scene", 3, index, fonts="builtin").facts for index in range(150)]
    sides = [max(f["height"], f["width"]) for f in facts]
    assert 280 < max(sides) <= 364 and sum(side <= 168 for side in sides) > len(sides) // 2
    largest = [max(o["radius"] for o in f["objects"]) for f in facts]
    assert max(largest) > 60 and sum(26 < radius for radius in largest) > len(largest) // 10
    plain = [synth.sample("scene", 3, index, level=0.0, fonts="builtin").facts for index in range(50)]
    assert max(max(f["height"], f["width"]) for f in plain) <= 112


def test_positions_near_a_border_are_not_asked():
    for index in range(600):
        drawn = synth.sample("scene", 4, index, fonts="builtin")
        if drawn.facts["question_type"] == "where":
            thing = next(t for t in drawn.facts["objects"] if _name(t) == drawn.facts["question_arguments"]["object"])
            for share in (thing["x"] / drawn.facts["width"], thing["y"] / drawn.facts["height"]):
                assert min(abs(share - 1 / 3), abs(share - 2 / 3)) >= 0.05


def test_reading_answers_are_the_text():
    for index in range(60):
        line = synth.sample("line", 1, index, fonts="builtin")
        assert line.answer == line.facts["text"] == " ".join(line.facts["rows"])
        assert line.answer == line.answer.strip() and "  " not in line.answer and line.answer.isascii()
        paragraph = synth.sample("paragraph", 1, index, fonts="builtin")
        assert paragraph.answer.split("\n") == paragraph.facts["rows"] and 2 <= len(paragraph.facts["rows"]) <= 4


def test_text_questions_are_answered_rightly():
    checks = collections.Counter()
    for index in range(120):
        question, answer = synth.text_sample(3, index, kind="spell")
        assert answer.replace(" ", "") in question
        question, answer = synth.text_sample(3, index, kind="join")
        assert " ".join(answer) in question
        question, answer = synth.text_sample(3, index, kind="copy")
        assert question.rstrip(".").endswith(answer.rstrip("."))
        question, answer = synth.text_sample(3, index, kind="reading")
        assert question.split("\n")[0] == f"The text is: {answer}"
        question, answer = synth.text_sample(3, index, kind="boxes")
        told = question.split("\n")[0].split(": ")[1].rstrip(".").split(", ")
        checks[answer] += 1
        assert answer in ("yes", "no", str(len(told)), ", ".join(t.split()[0] for t in told)) or any(answer in t for t in told)
    assert len(checks) > 15


@pytest.mark.parametrize("split", ["train", "held"])
def test_videos_move_as_they_say(split):
    for index in range(12):
        video = synth.video_sample(1, index, split, level=0.0)
        assert video.frames.shape == (8, 112, 112, 3)
        paper = video.frames[0, 0, 0].astype(int)
        inked = abs(video.frames[[0, -1]].astype(int) - paper).max(3) > 60
        centres = [[axis.mean() for axis in frame.nonzero()] for frame in inked]
        dy, dx = centres[1][0] - centres[0][0], centres[1][1] - centres[0][1]
        moved = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
        assert moved == video.facts["direction"]
        kind = video.facts["question_type"].removeprefix("video_")
        assert video.answer == video.facts[kind]
