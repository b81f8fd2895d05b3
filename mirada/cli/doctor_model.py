"""``mirada doctor --model``: what a model is and needs, from config.json alone; ``--verify``: whether a checkpoint is whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mirada.errors import CheckpointError, MiradaError, OutOfMemory

_IDS = (
    ("image_token_id", "image_pad"),
    ("video_token_id", "video_pad"),
    ("vision_start_token_id", "vision_start"),
    ("vision_end_token_id", "vision_end"),
)
"""Keys of config.json, and what the family's prompts call the string that must have that id."""


@dataclass(frozen=True, slots=True)
class Check:
    """One row: what was looked at, how it went, what was found, and how to mend it."""

    name: str
    status: Literal["ok", "fail", "skip"]
    found: str
    fix: str = ""


def run(model: str, verify: bool, as_json: bool) -> int:
    """Print what is known of ``model``, and the checks with ``verify``; 1 if a check failed, else 0. Raises MiradaError."""
    folder = _folder(model, verify)
    report = describe(folder)
    checks = examine(folder) if verify else []
    if as_json:
        rows = [{"name": c.name, "status": c.status, "found": c.found, "fix": c.fix} for c in checks]
        print(json.dumps({"folder": str(folder), **report, **({"checks": rows} if verify else {})}))
    else:
        _print(model, report, checks)
    return int(any(check.status == "fail" for check in checks))


def _folder(model: str, verify: bool) -> Path:
    """Where config.json lies; of a model on a hub only small files are fetched, unless it is to be verified."""
    from mirada.engine.load import find

    if not verify and not Path(model).is_dir():
        from mirada.hub.resolve import is_id, resolve

        if is_id(model):
            return resolve(model, weights=False)
    return find(model)


def describe(folder: Path) -> dict[str, Any]:
    """Sections ``model``, ``memory`` (a row per type of weights) and ``licence`` of the report."""
    from mirada.engine.place import rooms
    from mirada.models import facts
    from mirada.models.load import read_json

    made = facts.describe(read_json(folder / "config.json"), str(folder / "config.json"))
    tokens = min(facts.CONTEXT, made.context)
    places = rooms()
    memory = []
    for kind, size in made.weights.items():
        needed = made.needed(kind, tokens)
        fits = next((str(room.device) for room in places if room.free >= needed), None)
        row = {"weights": kind, "bytes": size, "needed": needed, "hardware": facts.hardware(needed), "fits": fits}
        if fits is None:
            row["why"] = "; ".join(
                f"{room.device} has {_gb(room.free)} free, {_gb(needed - room.free)} short" for room in places
            )
        memory.append(row)
    return {
        "model": {
            "model_type": made.model_type, "released_in": made.dtype, "parameters": made.parameters, "vision": made.vision,
            "experts": made.experts, "active_per_token": made.active, "unused_in_files": made.unused,
            "context": made.context, "cache_bytes_per_token": made.cache_bytes(1), "cache": made.cache_kind,
        },
        "memory": {"context": tokens, "rows": memory},
        "licence": {
            "name": _stated(folder) or made.licence.name,
            "conditions": made.licence.conditions,
            "source": "README.md of the checkpoint" if _stated(folder) else made.licence.source,
        },
    }  # fmt: skip


def _stated(folder: Path) -> str | None:
    """The licence that a model card names in its header."""
    file = folder / "README.md"
    if not file.is_file():
        return None
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    header = lines[1 : lines.index("---", 1)] if lines[:1] == ["---"] and "---" in lines[1:] else []
    return next((line.split(":", 1)[1].strip().strip("\"'") for line in header if line.startswith("license:")), None)


def examine(folder: Path) -> list[Check]:
    """All checks of a checkpoint, each by itself: one that fails does not hide the next."""
    checks: list[Check] = []
    held: dict[str, Any] = {}

    def check(name: str, work: Callable[[], str], *needs: str) -> None:
        missing = [need for need in needs if need not in held]
        if missing:
            checks.append(Check(name, "skip", f"not looked at, since {missing[0]} failed"))
            return
        try:
            checks.append(Check(name, "ok", work()))
            held[name] = True
        except OutOfMemory as error:
            checks.append(Check(name, "skip", error.problem, error.fix))
        except MiradaError as error:
            checks.append(Check(name, "fail", error.problem, error.fix))

    verifier = _Verifier(folder)
    check("config", verifier.config)
    check("weights", verifier.weights, "config")
    check("tokenizer", verifier.tokenizer, "config")
    check("special ids", verifier.ids, "tokenizer")
    check("template", verifier.template, "tokenizer")
    check("preprocessor", verifier.preprocessor, "config")
    check("memory", verifier.memory, "weights")
    check("text prompt", verifier.ask, "memory", "template", "preprocessor")
    check("picture prompt", verifier.look, "text prompt", "special ids")
    return checks


class _Verifier:
    """Looks at one part of a checkpoint after another; each method returns what it found or raises MiradaError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._engine: Any = None

    def config(self) -> str:
        from mirada.models.family import family_of
        from mirada.models.load import read_json

        where = self.folder / "config.json"
        self.mapping = read_json(where)
        self.family = family_of(self.mapping, str(where))
        self.settings = self.family.config(self.mapping)
        return f"family {self.family.model_type}, every key understood"

    def weights(self) -> str:
        from mirada import adapt
        from mirada.models import quantised, shards

        layout = self.family.layout(self.settings)
        files = shards.find(self.folder)
        stored = layout.released(shards.read_all(files))
        packed = quantised.check(layout, stored, adapt.read(self.mapping, str(self.folder / "config.json")))
        more = f", {len(packed)} matrices packed" if packed else ""
        return f"{len(stored)} tensors in {len(files)} files, every name and shape as the config says{more}"

    def tokenizer(self) -> str:
        from mirada.prompt.tokenizer import Tokenizer

        self.words = Tokenizer.from_directory(self.folder)
        return f"{len(self.words.control)} control strings"

    def ids(self) -> str:
        form, control = self.family.prompt_format(self.settings), self.words.control
        looked = 0
        for key, string in _IDS:
            wanted, text = getattr(self.settings, key, None), getattr(form, string)
            if wanted is None or not text:
                continue
            looked += 1
            if control.get(text) != wanted:
                raise CheckpointError(
                    f"config.json says {key} {wanted}, but {text!r} is {control.get(text, 'no token')} in the tokenizer",
                    "take config and tokenizer files of one release",
                )
        names = {token: text for text, token in control.items()}
        for token in self.settings.eos_token_ids:
            looked += 1
            if token not in names:
                raise CheckpointError(
                    f"config.json says that {token} ends a reply, which is no control token of the tokenizer",
                    "take config and tokenizer files of one release",
                )
        rows, used = self.settings.text.vocab_size, [text for text in form.eos if text in control]
        high = next((text for text in used if control[text] >= rows), None)
        if high is not None:
            raise CheckpointError(
                f"token {high!r} is {control[high]}, and the model has rows for {rows}", "take the tokenizer of this release"
            )
        return f"{looked} ids as config.json says"

    def template(self) -> str:
        from mirada.prompt.template import Template

        made = Template.from_directory(self.folder, self.family.prompt_format(self.settings))
        return f"{made.origin} is read"

    def preprocessor(self) -> str:
        from mirada.models.load import read_json

        file = self.folder / "preprocessor_config.json"
        rule = self.family.media_rule(self.settings, read_json(file) if file.is_file() else None)
        bounds = f"pictures of {rule.grid.min_pixels} to {rule.grid.max_pixels} pixels"
        return bounds if file.is_file() else f"none is there; the family's own: {bounds}"

    def memory(self) -> str:
        from mirada import adapt
        from mirada.engine.load import check_weights, pick_device, pick_dtype, precision_of, unasked_mode

        device = pick_device(None)
        dtype = pick_dtype(None, device, self.mapping)
        scheme = adapt.read(self.mapping, str(self.folder / "config.json"))
        mode = unasked_mode(self.folder, scheme, device)
        check_weights(self.folder, dtype, device, mode=mode)
        return f"the weights fit on {device}, where they are kept as {precision_of(mode, scheme, dtype)}"

    def ask(self) -> str:
        from mirada import VLM, Message

        self._engine = VLM(self.folder)
        return self._answer([Message("user", "Say hello.")])

    def look(self) -> str:
        from PIL import Image as Pillow
        from PIL import ImageDraw

        from mirada import Image, Message, Text

        picture = Pillow.new("RGB", (168, 112), "white")
        ImageDraw.Draw(picture).ellipse((40, 20, 120, 100), fill=(200, 20, 20))
        return self._answer([Message("user", [Image(picture), Text("Which colour has the circle?")])])

    def _answer(self, chat: list[Any]) -> str:
        output = self._engine.generate([chat], {"max_tokens": 16})[0]
        if output.error is not None:
            raise output.error
        from mirada.cli.show import printable

        said = printable(output.message.text or output.message.reasoning or "").strip().replace("\n", " ")
        return f"{len(output.tokens)} tokens: {said[:60]!r}"


def _gb(size: int) -> str:
    from mirada.engine.memory import say

    return say(max(size, 0))


def _print(model: str, report: dict[str, Any], checks: list[Check]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    for index, (name, value) in enumerate(_lines(report)):
        table.add_row(f"[bold]{escape(model)}[/bold]" if index == 0 else "", name, escape(value))
    console.print(table)
    table = Table(box=None, pad_edge=False, title_justify="left", title=f"memory with {report['memory']['context']} tokens")
    for column in ("weights in", "weights", "in all", "this machine", "needs"):
        table.add_column(column)
    for row in report["memory"]["rows"]:
        here = f"fits on {row['fits']}" if row["fits"] else f"does not fit: {row['why']}"
        table.add_row(row["weights"], _gb(row["bytes"]), _gb(row["needed"]), here, row["hardware"])
    console.print(table)
    if not checks:
        return
    colours = {"ok": "green", "fail": "red", "skip": "yellow"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        shown = f"{check.found}. {check.fix}" if check.fix else check.found
        table.add_row(f"[{colours[check.status]}]{check.status}[/]", check.name, escape(shown))
    console.print(table)


def _lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    m, licence = report["model"], report["licence"]
    lines = [
        ("family", m["model_type"]),
        ("parameters", f"{m['parameters']:,} ({m['vision']:,} of them vision), released in {m['released_in']}"),
    ]
    if m["experts"]:
        lines.append(("per token of text", f"{m['active_per_token']:,} of them; {m['experts']:,} lie in experts"))
    if m["unused_in_files"]:
        lines.append(("in the files besides", f"{m['unused_in_files']:,} that take no part"))
    source = f" ({licence['source']})" if licence["source"] else ""
    return [
        *lines,
        ("context", f"{m['context']:,} tokens"),
        ("cache", f"{m['cache_bytes_per_token']:,} bytes a token in 16 bits; {m['cache']}"),
        ("licence", f"{licence['name']}: {licence['conditions']}{source}"),
    ]
