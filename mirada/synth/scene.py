"""Task ``scene``: coloured shapes, asked for count, colour, shape, place, relation and existence; as exercises, for lists."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from typing import Any

from mirada.synth import effects
from mirada.synth.phrasing import ask
from mirada.synth.shapes import DRAWN_SHAPES, PAPERS, PLURALS, colours_on, mark, place, shape_mask, tint
from mirada.synth.types import CELL, Dense, Options, Sample

Thing = dict[str, Any]
"""One object: shape, colour, x, y (centre, pixels), radius (pixels)."""
Question = tuple[dict[str, Any], dict[str, Any], str]
"""Values for the phrasing, arguments for the facts, answer."""

SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
_SPOKEN = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
_ENDS = {"left of": "left", "right of": "right", "above": "up", "below": "down"}
MARGIN = 10
"""Pixels by which positions must differ before a question relies on them."""


def _objects(rng: random.Random, options: Options, height: int, width: int, zoom: float, colours: list[str]) -> list[Thing]:
    most = 2 + round(6 * options.level)
    wanted = rng.randint(1, most)
    # A few scenes repeat one shape or one colour, so that counting is not always of one.
    shapes = rng.sample(DRAWN_SHAPES, rng.randint(1, 3)) if rng.random() < 0.4 else DRAWN_SHAPES
    tones = rng.sample(colours, rng.randint(1, 3)) if rng.random() < 0.4 else colours
    placed: list[Thing] = []
    largest = 20 if wanted > 4 else 40 if rng.random() < 0.35 * options.level else 26
    for _ in range(wanted * 12):
        radius = min(round(zoom * rng.randint(10, largest)), min(height, width) // 2 - 2)
        x, y = rng.randint(radius + 1, width - radius - 2), rng.randint(radius + 1, height - radius - 2)
        if all((x - o["x"]) ** 2 + (y - o["y"]) ** 2 >= (radius + o["radius"] + 3) ** 2 for o in placed):
            placed.append({"shape": rng.choice(shapes), "colour": rng.choice(tones), "x": x, "y": y, "radius": radius})
            if len(placed) == wanted:
                break
    return placed


def name(thing: Thing) -> str:
    return f"{thing['colour']} {thing['shape']}"


def _plural(thing: Thing) -> str:
    return f"{thing['colour']} {PLURALS[thing['shape']]}"


def _unique(things: list[Thing]) -> list[Thing]:
    """Objects whose colour and shape together occur once."""
    names = [name(thing) for thing in things]
    return [thing for thing, its in zip(things, names, strict=True) if names.count(its) == 1]


def _absent_or_any(rng: random.Random, things: list[Thing], key: str, choices: list[str]) -> str:
    """A value that occurs, or (one time in eight) any."""
    return rng.choice(choices) if rng.random() < 0.125 else rng.choice(things)[key]


def _count_all(rng: random.Random, facts: dict[str, Any]) -> Question:
    return {}, {}, str(len(facts["objects"]))


def _count_shape(rng: random.Random, facts: dict[str, Any]) -> Question:
    shape = _absent_or_any(rng, facts["objects"], "shape", list(DRAWN_SHAPES))
    total = sum(o["shape"] == shape for o in facts["objects"])
    return {"shape": shape, "shapes": PLURALS[shape]}, {"shape": shape}, str(total)


def _count_colour(rng: random.Random, facts: dict[str, Any]) -> Question:
    colour = _absent_or_any(rng, facts["objects"], "colour", facts["colours"])
    return {"colour": colour}, {"colour": colour}, str(sum(o["colour"] == colour for o in facts["objects"]))


def _count_both(rng: random.Random, facts: dict[str, Any]) -> Question:
    colour = _absent_or_any(rng, facts["objects"], "colour", facts["colours"])
    same = [o for o in facts["objects"] if o["colour"] == colour] or facts["objects"]
    shape = _absent_or_any(rng, same, "shape", list(DRAWN_SHAPES))
    total = sum(o["shape"] == shape and o["colour"] == colour for o in facts["objects"])
    return {"shapes": PLURALS[shape], "colour": colour}, {"shape": shape, "colour": colour}, str(total)


def _alone(rng: random.Random, facts: dict[str, Any], key: str) -> Thing | None:
    """An object whose ``key`` no other object shares."""
    values = [o[key] for o in facts["objects"]]
    fitting = [o for o in facts["objects"] if values.count(o[key]) == 1]
    return rng.choice(fitting) if fitting else None


def _colour_of(rng: random.Random, facts: dict[str, Any]) -> Question | None:
    thing = _alone(rng, facts, "shape")
    if thing is None:
        return None
    return {"shape": thing["shape"]}, {"shape": thing["shape"]}, thing["colour"]


def _shape_of(rng: random.Random, facts: dict[str, Any]) -> Question | None:
    thing = _alone(rng, facts, "colour")
    if thing is None:
        return None
    return {"colour": thing["colour"]}, {"colour": thing["colour"]}, thing["shape"]


def _third(value: int, size: int, names: tuple[str, str, str]) -> str | None:
    """Which third of ``size`` a position lies in; None within 5 % of a border between thirds."""
    share = value / size
    if min(abs(share - 1 / 3), abs(share - 2 / 3)) < 0.05:
        return None
    return names[int(share * 3)]


def place_name(thing: Thing, height: int, width: int) -> str | None:
    """ "top left", "top", ... "middle" ... of a 3 x 3 grid; None when on a border."""
    row = _third(thing["y"], height, ("top", "", "bottom"))
    column = _third(thing["x"], width, ("left", "", "right"))
    if row is None or column is None:
        return None
    return f"{row} {column}".strip() or "middle"


def _where(rng: random.Random, facts: dict[str, Any]) -> Question | None:
    fitting = [(o, place_name(o, facts["height"], facts["width"])) for o in _unique(facts["objects"])]
    fitting = [(o, spot) for o, spot in fitting if spot]
    if not fitting:
        return None
    thing, spot = rng.choice(fitting)
    return {"object": name(thing)}, {"object": name(thing)}, str(spot)


def on_side(thing: Thing, anchor: Thing, side: str) -> bool | None:
    """Whether ``thing`` lies on ``side`` of ``anchor``; None when within MARGIN pixels."""
    dx, dy = SIDES[side]
    ahead = (thing["x"] - anchor["x"]) * dx + (thing["y"] - anchor["y"]) * dy
    return None if abs(ahead) < MARGIN else ahead > 0


def _relation(rng: random.Random, facts: dict[str, Any]) -> Question | None:
    found = []
    for anchor in _unique(facts["objects"]):
        for side in SIDES:
            others = [(o, on_side(o, anchor, side)) for o in facts["objects"] if o is not anchor]
            ahead = [o for o, is_ahead in others if is_ahead]
            if len(ahead) == 1 and all(is_ahead is not None for _, is_ahead in others):
                found.append((anchor, side, ahead[0]))
    if not found:
        return None
    anchor, side, thing = rng.choice(found)
    spoken = rng.choice(_SPOKEN[side])
    values = {"object": name(anchor), "side": spoken, "Side": spoken[0].upper() + spoken[1:]}
    return values, {"object": name(anchor), "side": side}, name(thing)


def _exists(rng: random.Random, facts: dict[str, Any]) -> Question:
    thing = rng.choice(facts["objects"])
    if rng.random() < 0.5:  # change one property or both: mostly absent then
        thing = dict(thing)
        keys = rng.choice((["shape"], ["colour"], ["shape", "colour"]))
        if "shape" in keys:
            thing["shape"] = rng.choice(DRAWN_SHAPES)
        if "colour" in keys:
            thing["colour"] = rng.choice(facts["colours"])
    there = any(name(o) == name(thing) for o in facts["objects"])
    return {"object": name(thing), "objects": _plural(thing)}, {"object": name(thing)}, "yes" if there else "no"


EXTREMES: dict[str, Callable[[Thing], int]] = {
    "leftmost": lambda o: -o["x"],
    "rightmost": lambda o: o["x"],
    "topmost": lambda o: -o["y"],
    "lowest": lambda o: o["y"],
    "largest": lambda o: o["radius"],
    "smallest": lambda o: -o["radius"],
}


def _extreme(rng: random.Random, facts: dict[str, Any]) -> Question | None:
    if len(facts["objects"]) < 2:
        return None
    most = rng.choice(tuple(EXTREMES))
    ordered = sorted(facts["objects"], key=EXTREMES[most])
    gap = EXTREMES[most](ordered[-1]) - EXTREMES[most](ordered[-2])
    sized = most in ("largest", "smallest")
    # Sizes of different shapes are hard to compare: only like shapes are.
    if gap < (5 if sized else MARGIN) or (sized and len({o["shape"] for o in ordered}) > 1):
        return None
    return {"most": most}, {"most": most}, name(ordered[-1])


def _compare(rng: random.Random, facts: dict[str, Any]) -> Question | None:
    fitting = _unique(facts["objects"])
    if len(fitting) < 2:
        return None
    thing, other = rng.sample(fitting, 2)
    side = rng.choice(tuple(SIDES))
    is_ahead = on_side(thing, other, side)
    if is_ahead is None:
        return None
    values = {"object": name(thing), "other": name(other), "side": rng.choice(_SPOKEN[side])}
    return values, {"object": name(thing), "other": name(other), "side": side}, "yes" if is_ahead else "no"


def _pair(rng: random.Random, facts: dict[str, Any]) -> tuple[Thing, Thing, str] | None:
    """Two objects, each the only one of its name, and a side on which the first clearly lies of the second."""
    fitting = _unique(facts["objects"])
    if len(fitting) < 2:
        return None
    pairs = [(a, b, side) for a, b in itertools.permutations(fitting, 2) for side in SIDES if on_side(a, b, side)]
    if pairs and rng.random() < 0.5:  # clear ones are learnt first
        pairs = sorted(pairs, key=_distance, reverse=True)[: 1 + len(pairs) // 4]
    return rng.choice(pairs) if pairs else None


def _distance(pair: tuple[Thing, Thing, str]) -> int:
    thing, other, side = pair
    return abs(thing["x"] - other["x"]) if SIDES[side][0] else abs(thing["y"] - other["y"])


def _side_of(rng: random.Random, facts: dict[str, Any]) -> Question | None:
    """What "compare" asks, but the answer is the side: it teaches more than a yes or no."""
    pair = _pair(rng, facts)
    if pair is None:
        return None
    thing, other, side = pair
    sides = "left or right of" if side in ("left of", "right of") else "above or below"
    arguments = {"object": name(thing), "other": name(other), "sides": sides}
    return arguments, arguments, side.removesuffix(" of")


def _further(rng: random.Random, facts: dict[str, Any]) -> Question | None:
    """Which of two objects lies further to one side."""
    pair = _pair(rng, facts)
    if pair is None:
        return None
    thing, other, side = pair
    first, second = rng.sample((name(thing), name(other)), 2)
    arguments = {"object": first, "other": second, "end": _ENDS[side]}
    return arguments, arguments, name(thing)


def _where_each(rng: random.Random, facts: dict[str, Any]) -> Question | None:
    """The places of two to four objects in one answer: each name must find its own object before anything is compared."""
    fitting = [(o, place_name(o, facts["height"], facts["width"])) for o in _unique(facts["objects"])]
    fitting = [(name(o), spot) for o, spot in fitting if spot]
    if len(fitting) < 2:
        return None
    chosen = rng.sample(fitting, min(len(fitting), rng.randint(2, 4)))
    objects = ", ".join(its for its, _ in chosen)
    return {"objects": objects}, {"objects": objects}, ", ".join(str(spot) for _, spot in chosen)


def _what_at(rng: random.Random, facts: dict[str, Any]) -> Question | None:
    """What lies in a part of the picture that holds one object alone, clear of the part's border."""
    height, width = facts["height"], facts["width"]
    cells = [(3 * o["y"] // height, 3 * o["x"] // width) for o in facts["objects"]]
    fitting = [(o, place_name(o, height, width)) for o, at in zip(facts["objects"], cells, strict=True) if cells.count(at) == 1]
    fitting = [(o, spot) for o, spot in fitting if spot]
    if not fitting:
        return None
    thing, spot = rng.choice(fitting)
    return {"spot": spot}, {"spot": spot}, name(thing)


def _list(rng: random.Random, facts: dict[str, Any], key: str) -> Question | None:
    """All objects in the order of ``key``, where no two of them are nearly level."""
    ordered = sorted(facts["objects"], key=lambda o: o[key])
    if any(b[key] - a[key] < MARGIN // 2 for a, b in itertools.pairwise(ordered)):
        return None
    return {}, {}, ", ".join(name(o) for o in ordered)


def _list_across(rng: random.Random, facts: dict[str, Any]) -> Question | None:
    return _list(rng, facts, "x")


def _list_down(rng: random.Random, facts: dict[str, Any]) -> Question | None:
    return _list(rng, facts, "y")


QUESTIONS: dict[str, Callable[[random.Random, dict[str, Any]], Question | None]] = {
    "count_all": _count_all, "count_shape": _count_shape, "count_colour": _count_colour, "count_both": _count_both,
    "colour_of": _colour_of, "shape_of": _shape_of, "where": _where, "relation": _relation, "exists": _exists,
    "extreme": _extreme, "compare": _compare,
}  # fmt: skip
EXERCISES = QUESTIONS | {
    "what_at": _what_at, "where_each": _where_each, "side_of": _side_of, "further": _further,
    "list_across": _list_across, "list_down": _list_down,
}  # fmt: skip
"""What further turns ask: beside the questions, exercises whose answers say more about places than the questions' do."""
PRACTICE = {"where": 5, "compare": 5, "colour_of": 4, "exists": 3,
            "count_all": 3, "count_shape": 3, "count_colour": 3, "count_both": 2,
            "where_each": 7, "side_of": 4, "further": 3, "what_at": 2, "list_across": 0.15, "list_down": 0.15}  # fmt: skip
"""How often further turns ask a type, against 1 for the others: often what is learnt last, seldom what takes many tokens."""


def choose_question(
    rng: random.Random,
    facts: dict[str, Any],
    questions: dict[str, Any],
    phrasing: str,
    often: Mapping[str, float] | None = None,
) -> tuple[str, str]:
    """Pick a question type that suits the facts, note it there, and return (question, answer). ``often``: weights against 1."""
    kinds = list(questions)
    weights = None if often is None else [often.get(kind, 1) for kind in kinds]
    while True:
        kind = rng.choice(kinds) if weights is None else rng.choices(kinds, weights)[0]
        made = questions[kind](rng, facts)
        if made is not None:
            values, arguments, answer = made
            facts["question_type"], facts["question_arguments"] = kind, arguments
            return ask(rng, kind, phrasing, **values), answer


def draw_scene(rng: random.Random, options: Options) -> Sample:
    """Draw shapes that do not overlap, 84 x 84 to 168 x 168 pixels or up to 2.2 times that, and ask one question."""
    level = options.level
    zoom = rng.uniform(1, 2.2) if rng.random() < 0.4 * level else 1.0
    width, height = (CELL * round(zoom * rng.randint(3, 4 + round(2 * level))) for _ in range(2))
    paper = rng.choice(PAPERS)
    names = colours_on(paper)
    objects = _objects(rng, options, height, width, zoom, names)
    paper = effects.shifted(rng, paper, round(8 * level))
    end = effects.shifted(rng, paper, 16) if rng.random() < 0.2 * level else paper
    canvas = effects.background(rng, height, width, paper, end, 0.5 * level)
    dense = Dense.empty(height, width)
    for thing in objects:
        turn = rng.randint(-12, 12) if rng.random() < 0.5 * level and thing["shape"] not in ("square", "diamond") else 0
        mask = shape_mask(thing["shape"], thing["radius"], turn)
        left, top = thing["x"] - thing["radius"], thing["y"] - thing["radius"]
        place(canvas, mask, left, top, tint(rng, thing["colour"], level))
        mark(dense, mask, left, top, thing["shape"], thing["colour"])
    image = effects.disturb(rng, canvas, 0.7 * level)
    facts: dict[str, Any] = {"objects": objects, "colours": names, "height": height, "width": width}
    question, answer = choose_question(rng, facts, QUESTIONS, options.phrasing)
    return Sample("scene", image, question, answer, dense, facts)
