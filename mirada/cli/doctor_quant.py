"""``mirada doctor --model X --quant MODE``: what rounding does to each matrix, worst first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mirada.errors import NotAvailable, SettingsError

_SHOWN = 20


def run(model: str, quant: str, as_json: bool) -> int:
    """Round ``model`` as ``VLM(model, quant=...)`` does and print the error of each matrix; 0. Raises MiradaError."""
    from mirada.engine.load import find

    rows = measure(find(model), quant)
    if as_json:
        print(json.dumps({"model": model, "quant": quant, "matrices": rows}))
    else:
        _print(model, quant, rows)
    return 0


def measure(folder: Path, quant: str) -> list[dict[str, Any]]:
    """A row for each matrix that is to be rounded: ``name`` as stored, ``bits``, ``error``, ``most``, and ``kept_exact``."""
    import torch

    from mirada import adapt
    from mirada.adapt.mode import parse
    from mirada.engine.load import check_mode, check_weights
    from mirada.models import rounding
    from mirada.models.load import load_model, read_json

    where, cpu = folder / "config.json", torch.device("cpu")
    scheme = adapt.read(read_json(where), str(where))
    mode = check_mode(parse(quant), scheme, cpu, torch.float32, False, False)
    if mode is None or not mode.rounds:
        raise SettingsError(f"--quant {quant} rounds nothing", "give int8 or int4, if need be with a group: int4:64")
    if scheme is not None and not scheme.widens:
        raise NotAvailable(f"{folder.name} is stored as {scheme.method}", "what rounded it is the place to ask for its errors")
    check_weights(folder, torch.float32, cpu, mode=mode)
    found = rounding.of(load_model(folder, mode=mode))
    return [
        {"name": name, "bits": one.bits, "error": one.error, "most": rounding.MOST[one.bits], "kept_exact": one.too_much}
        for name, one in sorted(found.items(), key=lambda item: -item[1].error / rounding.MOST[item[1].bits])
    ]


def _print(model: str, quant: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    kept = sum(row["kept_exact"] for row in rows)
    table = Table(box=None, pad_edge=False, title_justify="left", title=f"{escape(model)} in {quant}: {len(rows)} matrices")
    for column in ("matrix", "bits", "error", "at most", ""):
        table.add_column(column, overflow="fold")
    shown = rows[: max(_SHOWN, kept)]
    for row in shown:
        said = "[yellow]stays exact[/]" if row["kept_exact"] else "rounded"
        table.add_row(escape(row["name"]), str(row["bits"]), f"{row['error']:.4f}", f"{row['most']:.2f}", said)
    console.print(table)
    if len(shown) < len(rows):
        console.print(f"and {len(rows) - len(shown)} with smaller errors (all of them with --json)")
    console.print(f"{kept} of them stay exact." if kept else "None of them has to stay exact.")
