"""``mirada doctor --model X --parity [FILE]``: one picture through the model stage by stage, beside another run of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirada.errors import SettingsError

REFERENCES = ("eager", "float32", "transformers")


@dataclass(frozen=True, slots=True)
class Asked:
    """What to run and what to compare it with; see ``docs/parity.md``."""

    model: str
    file: Path | None = None
    """A recording."""
    record: Path | None = None
    against: str | None = None
    image: str | None = None
    question: str | None = None
    quant: str | None = None
    dtype: str | None = None

    def check(self) -> None:
        """SettingsError for what contradicts itself."""
        if self.against is not None and self.against not in REFERENCES:
            raise SettingsError(f"--against {self.against} is unknown", f"use one of {', '.join(REFERENCES)}, or give a file")
        if self.file is not None and self.against is not None:
            raise SettingsError("a recording is given beside --against", "compare with one of the two at a time")
        if self.quant is not None and self.dtype is not None:
            raise SettingsError("--quant is given beside --dtype", "give one of the two")

    @property
    def reference(self) -> str:
        """``eager``: the same matrices with attention as it is written. ``float32``: what a coarser form is measured by."""
        return self.against or ("float32" if self.quant or self.dtype not in (None, "float32") else "eager")


def run(asked: Asked, as_json: bool) -> int:
    """Print the stages; 1 if one is beyond its limit, else 0. Raises MiradaError."""
    asked.check()
    ours, theirs = measure(asked)
    if theirs is None:
        _say_recorded(asked, ours, as_json)
        return 0
    from mirada.models.parity import compare

    report = compare(ours, theirs)
    if as_json:
        print(json.dumps(_as_json(asked, ours, theirs, report)))
    else:
        _print(asked, ours, theirs, report)
    return int(report.first is not None)


def measure(asked: Asked) -> tuple[Any, Any]:
    """Our run, and the one to compare it with; None if ours is only to be recorded."""
    from mirada.models.parity import Recording, check_same, inputs
    from mirada.models.parity import run as run_stages

    held = None if asked.file is None else Recording.load(asked.file)
    parts = _load(asked)
    picture, question = asked.image, asked.question
    if held is not None:
        picture = held.picture() if picture is None else picture
        question = question or held.facts.get("question")
    given = inputs(parts.renderer, parts.rule, picture, question)
    ours = run_stages(parts.model, given, parts.rule, parts.precision, parts.eos)
    if asked.record is not None:
        ours.save(asked.record)
    if held is not None:
        check_same(ours, held)
        return ours, held
    if asked.record is not None and asked.against is None:
        return ours, None
    if asked.reference == "transformers":
        from mirada.engine.load import find
        from mirada.models.parity_peer import Peer

        model_type = parts.model.config.model_type
        peer = Peer(find(asked.model), model_type)
        return ours, peer.run(given, parts.renderer, parts.rule, dict(ours.facts), parts.eos)
    if asked.reference == "eager":
        from mirada.layers.kinds import set_kind

        set_kind(parts.model, "eager")
        return ours, run_stages(parts.model, given, parts.rule, parts.precision, parts.eos)
    eos = parts.eos
    del parts  # two of a large model may not fit
    wide = _load(Asked(asked.model, dtype="float32"))
    return ours, run_stages(wide.model, given, wide.rule, wide.precision, eos)


def _load(asked: Asked) -> Any:
    from mirada.engine.load import load

    return load(asked.model, dtype=asked.dtype or (None if asked.quant else "float32"), quant=asked.quant)


def _say_recorded(asked: Asked, ours: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"model": asked.model, "recorded": str(asked.record), "stages": list(ours.stages), **_facts(ours)}))
    else:
        print(f"{len(ours.stages)} stages of {asked.model} ({ours.precision}) are in {asked.record}")


def _facts(side: Any) -> dict[str, str]:
    return {name: side.facts.get(name, "") for name in ("precision", "software", "device", "question")}


def _as_json(asked: Asked, ours: Any, theirs: Any, report: Any) -> dict[str, Any]:
    rows = [
        {
            "stage": row.stage, "shape": list(row.shape), "largest": _number(row.largest), "relative": _number(row.relative),
            "typical": _number(row.typical), "limit": {"largest": row.limit.largest, "typical": row.limit.typical},
            "within": row.within, "note": row.note,
        }
        for row in report.rows
    ]  # fmt: skip
    first = report.first.stage if report.first else None
    sides = {"ours": _facts(ours), "theirs": _facts(theirs)}
    return {"model": asked.model, **sides, "stages": rows, "first_beyond": first, "notes": list(report.notes)}


def _number(value: float | None) -> float | None:
    """JSON has no word for what is not finite."""
    return value if value is not None and abs(value) < float("inf") else None


def _print(asked: Asked, ours: Any, theirs: Any, report: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    title = f"{asked.model} ({ours.precision}; {ours.facts['device']})\nbeside {theirs.precision}; {_facts(theirs)['software']}"
    table = Table(box=None, pad_edge=False, title_justify="left", title=escape(f"{title}; {_facts(theirs)['device']}"))
    for column in ("stage", "shape", "largest", "relative", "typical", "limits", ""):
        table.add_column(column, overflow="fold", no_wrap=column != "")
    for row in report.rows:
        shares = ["-" if value is None else f"{value:.2g}" for value in (row.relative, row.typical)]
        said = ("ok" if row.within else "[red]beyond[/]") + (f" {escape(row.note)}" if row.note else "")
        limits = f"{row.limit.largest:g} {row.limit.typical:g}"
        table.add_row(row.stage, "x".join(map(str, row.shape)), f"{row.largest:.2g}", *shares, limits, said)
    console.print(table)
    for note in report.notes:
        console.print(escape(note), highlight=False)
    if report.first is None:
        console.print("Every stage is within its limits.", highlight=False)
    else:
        console.print(f"The first stage beyond its limits is '{escape(report.first.stage)}'.", highlight=False)
