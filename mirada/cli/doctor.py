"""``mirada doctor``: what is installed, what the machine offers, and how to mend what is missing."""

from __future__ import annotations

import json
import platform
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mirada import __version__, config
from mirada.errors import SettingsError
from mirada.layers.kernels.library import AGAIN

_MODULES = {  # distribution -> module, where they differ
    "pillow": "PIL",
    "pyyaml": "yaml",
    "prometheus-client": "prometheus_client",
    "math-verify": "math_verify",
    "import-linter": "importlinter",
    "pre-commit": "pre_commit",
    "pytest-xdist": "xdist",
}
_CODECS = ("h264", "hevc", "vp9", "av1", "mpeg4", "mjpeg")
_DRIVER = Path("/proc/driver/nvidia/version")
_PICTURES = ("jpg", "zlib", "webp", "avif", "libtiff", "jpg_2000")


@dataclass(frozen=True, slots=True)
class Problem:
    """``level`` "error": asking cannot work; "warning": it works worse; "note": something optional is absent."""

    level: str
    problem: str
    fix: str


def run(as_json: bool) -> int:
    """Print the report; the exit code is 1 if something is broken, else 0."""
    report, problems = examine()
    if as_json:
        print(json.dumps({**report, "problems": [{"level": p.level, "problem": p.problem, "fix": p.fix} for p in problems]}))
    else:
        _print(report, problems)
    return int(any(problem.level == "error" for problem in problems))


def examine() -> tuple[dict[str, Any], list[Problem]]:
    """Every section of the report by name, and what is wrong."""
    problems: list[Problem] = []
    report = {
        "versions": _versions(problems),
        "devices": _devices(problems),
        "decoders": _decoders(problems),
        "threads": _threads(problems),
        "memory": _memory(problems),
        "models": _models(problems),
        "extras": _extras(problems),
    }
    return report, problems


def _requirements() -> list[tuple[str, str | None]]:
    """(distribution, extra or None) of everything that Mirada's own metadata asks for on this platform."""
    found = []
    for line in metadata.requires("mirada") or ():
        name = re.match(r"[A-Za-z0-9._-]+", line)
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", line)
        other = re.search(r"sys_platform == ['\"]([^'\"]+)['\"]", line)
        if name and not (other and other[1] != sys.platform):
            found.append((name[0].lower().replace("_", "-"), extra[1] if extra else None))
    return found


def _present(distribution: str) -> bool:
    return find_spec(_MODULES.get(distribution, distribution.replace("-", "_"))) is not None


def _versions(problems: list[Problem]) -> dict[str, str]:
    made = {"mirada": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name, extra in _requirements():
        if extra is None:
            if _present(name):
                made[name] = metadata.version(name)
            else:
                problems.append(Problem("error", f"the package {name} is missing", f"pip install {name}"))
    return made


def _devices(problems: list[Problem]) -> dict[str, Any]:
    if not _present("torch"):
        return {}
    import torch

    made: dict[str, Any] = {"cpu": f"{_cores()} cores, {torch.backends.cpu.get_cpu_capability()}"}
    made["cpu kernels"] = _kernels(problems)
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        made[f"cuda:{index}"] = f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB, capability {facts.major}.{facts.minor}"
    if torch.backends.mps.is_available():
        made["mps"] = "Apple GPU"
    if _DRIVER.exists() and torch.version.cuda is None:
        problems.append(
            Problem(
                "warning",
                f"there is an NVIDIA driver, but torch {torch.__version__} is built for the CPU",
                "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128",
            )
        )
    return made


def _kernels(problems: list[Problem]) -> str:
    """Which kernels multiply on the CPU, and what stands in for them."""
    from mirada.layers.kernels import library

    try:
        status = library.status()
    except SettingsError as error:
        problems.append(Problem("error", error.problem, error.fix))
        return error.problem
    if status.name != "none":
        return f"compiled, {status.name} ({status.why})"
    instead = (
        "int8 by torch's quantized::linear_dynamic (fbgemm, deprecated), int4 and bfloat16 widened tile by tile; "
        "bfloat16 checkpoints load as float32 unless quant='exact' is given"
    )
    problems.append(Problem("warning", f"no compiled CPU kernels: {status.why}; {instead}", status.fix))
    return f"none ({status.why}): {instead}"


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decoders(problems: list[Problem]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if _present("av"):
        import av

        made["pyav"] = av.__version__
        made["ffmpeg"] = ", ".join(f"{name} {'.'.join(map(str, version))}" for name, version in av.library_versions.items())
        made["video"] = [codec for codec in _CODECS if codec in av.codecs_available]
        missing = [codec for codec in _CODECS if codec not in made["video"]]
        if missing:
            problems.append(
                Problem("warning", f"PyAV's FFmpeg cannot decode {', '.join(missing)}", "pip install --force-reinstall av")
            )
    if _present("pillow"):
        from PIL import features

        made["pictures"] = [name for name in _PICTURES if features.check(name)]
        missing = [name for name in _PICTURES if name not in made["pictures"]]
        if missing:
            problems.append(Problem("warning", f"Pillow lacks {', '.join(missing)}", "pip install --force-reinstall pillow"))
    return made


def _threads(problems: list[Problem]) -> dict[str, Any]:
    made: dict[str, Any] = {name: config.env(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS")}
    if _present("torch"):
        import torch

        made["torch"] = torch.get_num_threads()
        if made["torch"] > _cores():
            problems.append(
                Problem(
                    "warning", f"torch uses {made['torch']} threads on {_cores()} cores", f"export OMP_NUM_THREADS={_cores()}"
                )
            )
    if config.TORCH_CAME_FIRST and not config.WAIT_POLICY_CHOSEN:
        problems.append(
            Problem(
                "warning",
                "torch was loaded before Mirada, so OMP_WAIT_POLICY=PASSIVE came too late: waiting threads spin",
                "import mirada before torch, or export OMP_WAIT_POLICY=PASSIVE",
            )
        )
    elif (config.env("OMP_WAIT_POLICY") or "").upper() == "ACTIVE":
        problems.append(
            Problem("warning", "OMP_WAIT_POLICY=ACTIVE: waiting threads spin beside busy neighbours", "unset OMP_WAIT_POLICY")
        )
    return made


def _memory(problems: list[Problem]) -> dict[str, float]:
    """GiB: of the machine, of the container's limit where there is one, and free now."""
    made: dict[str, float] = {}
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        kilobytes = {
            key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in meminfo.read_text().splitlines())
        }
        made = {"total": round(kilobytes["MemTotal"] / 2**20, 1), "available": round(kilobytes["MemAvailable"] / 2**20, 1)}
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        made["limit"] = round(int(limit.read_text()) / 2**30, 1)
        used = Path("/sys/fs/cgroup/memory.current")
        if used.exists():
            made["available"] = min(
                made.get("available", made["limit"]), round(made["limit"] - int(used.read_text()) / 2**30, 1)
            )
    if 0 < made.get("available", 1) < 1:
        problems.append(Problem("warning", f"only {made['available']} GiB of memory are free", "end other programs"))
    return made


def _models(problems: list[Problem]) -> dict[str, str]:
    folder = Path(__file__).parents[1] / "assets" / "mini"
    parts = sorted(folder.glob("*.safetensors"))
    if not (parts and (folder / "config.json").exists()):
        problems.append(Problem("error", f"the model mini is not in {folder}", AGAIN))
        return {}
    return {"mini": f"{sum(part.stat().st_size for part in parts) / 1e6:.1f} MB in {folder}"}


def _extras(problems: list[Problem]) -> dict[str, str]:
    missing: dict[str, list[str]] = {}
    for name, extra in _requirements():
        if extra is not None:
            missing.setdefault(extra, [])
            if not _present(re.sub(r"\[.*", "", name)):
                missing[extra].append(name)
    for extra, names in missing.items():
        if names:
            problems.append(Problem("note", f"the extra [{extra}] lacks {', '.join(names)}", f"pip install 'mirada[{extra}]'"))
    return {
        extra: f"lacks {', '.join(names)}: pip install 'mirada[{extra}]'" if names else "installed"
        for extra, names in missing.items()
    }


def _print(report: dict[str, Any], problems: list[Problem]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    for section, facts in report.items():
        for index, (name, value) in enumerate(facts.items()):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else "not set" if value is None else str(value)
            if section == "memory":
                shown += " GiB"
            table.add_row(f"[bold]{section}[/bold]" if index == 0 else "", name, escape(shown))
    console.print(table)
    colours = {"error": "red", "warning": "yellow"}
    for problem in problems:
        if problem.level == "note":  # said in its section, with its fix
            continue
        console.print(f"\n[{colours[problem.level]}]{problem.level}[/]  {escape(problem.problem)}", highlight=False)
        console.print(f"  {problem.fix}", highlight=False, markup=False, soft_wrap=True)
    if not any(problem.level == "error" for problem in problems):
        console.print("\nAll that asking needs is there.")
