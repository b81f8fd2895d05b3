"""The public face: what it lists, how quickly it loads, and what it must not load."""

from __future__ import annotations

import ast
import copy
import io
import pickle
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mirada
from mirada import errors, types

ROOT = Path(mirada.__file__).parent

PUBLIC = {
    "VLM",
    "Message",
    "Text",
    "Image",
    "Video",
    "ToolCall",
    "Sampling",
    "Delta",
    "Output",
    "Usage",
    "Logprob",
    *(name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)),
}


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_public_names_are_these_and_each_is_there():
    assert set(mirada.__all__) == PUBLIC
    assert set(dir(mirada)) == PUBLIC | {"__version__"}
    for name in PUBLIC:
        assert getattr(mirada, name) is not None
    assert mirada.Image is types.Image and mirada.MediaError is errors.MediaError


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'Vlm'"):
        mirada.Vlm  # noqa: B018


def test_import_is_quick_and_loads_nothing_heavy():
    heavy = "torch numpy PIL av tokenizers rich typer yaml pyarrow jinja2 httpx"
    assert fresh(f"import sys, mirada; print([m for m in {heavy.split()!r} if m in sys.modules])") == "[]"
    code = "import time; t = time.process_time(); import mirada; print(time.process_time() - t)"
    assert min(float(fresh(code)) for _ in range(3)) < 0.2


@pytest.mark.parametrize("room", ["records", "media", "prompt", "client", "synth", "cli"])
def test_rooms_that_load_without_torch(room):
    folder = ROOT / room
    files = [folder.with_suffix(".py")] if not folder.is_dir() else sorted(folder.rglob("*.py"))
    names = [
        str(f.relative_to(ROOT.parent).with_suffix("")).replace("/", ".")
        for f in files
        if f.name not in ("exact.py", "__main__.py")
    ]
    assert names
    code = f"import importlib, sys; [importlib.import_module(n) for n in {names!r}]; print('torch' in sys.modules)"
    assert fresh(code) == "False"


def test_only_config_touches_the_environment():
    reads = re.compile(r"\bos\.(environ|getenv|putenv)|from os import .*(environ|getenv)")
    found = [str(f) for f in ROOT.rglob("*.py") if reads.search(f.read_text()) and f != ROOT / "config.py"]
    assert found == []


@cache
def imports(root: Path) -> dict[Path, list[str]]:
    """All that each module of the package at ``root`` imports, lazily and for types too, with its whole name."""
    made: dict[Path, list[str]] = {}
    for file in root.rglob("*.py"):
        made[file] = []
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                made[file] += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.module and not node.level, f"{file} has a relative import"
                made[file] += [f"{node.module}.{alias.name}" for alias in node.names]
    return made


def test_nothing_unpickles():
    for file, names in imports(ROOT).items():
        assert not {"pickle", "cPickle", "dill", "joblib", "shelve"} & {part for name in names for part in name.split(".")}, (
            file
        )


def circle(root: Path) -> list[str]:
    """Modules of the package at ``root`` of which each is imported by the next, and the last is the first; none if there are no
    such."""
    dotted = {file: ".".join(file.relative_to(root.parent).with_suffix("").parts) for file in imports(root)}
    files = {name.removesuffix(".__init__"): file for file, name in dotted.items()}
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        whole = [(found, found.rpartition(".")[0]) for found in imports(root)[file]]
        graph[name] = {found if found in files else parent for found, parent in whole} & set(files)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other_in_a_circle(tmp_path):
    assert circle(ROOT) == []
    house = tmp_path / "house"
    house.mkdir()
    for name, text in {
        "__init__": "",
        "a": "def f():\n    from house import b",
        "b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import house.c",
        "c": "from house.a import f",
    }.items():
        (house / f"{name}.py").write_text(text)
    assert set(circle(house)) == {"house.a", "house.b", "house.c"}


def test_functions_and_files_stay_short():
    for file in ROOT.rglob("*.py"):
        source = file.read_text()
        assert source.count("\n") < 500, f"{file} is too long"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{file}: {node.name} is too long"


def test_every_error_is_drawn_in_the_tree():
    drawn = errors.__doc__ or ""
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.MiradaError):
            assert re.search(rf"\b{name}\b", drawn), name


def test_an_error_says_problem_and_fix():
    error = errors.MediaNotFound("nothing lies at 'a.png'", "check the path")
    assert str(error) == "nothing lies at 'a.png'. check the path"
    assert str(errors.MediaNotFound("nothing lies at 'a.png'")) == "nothing lies at 'a.png'"
    assert isinstance(error, ValueError) and isinstance(error, errors.InputError)


def test_capacity_carries_its_numbers():
    error = errors.ContextOverflow("too long", "shorten it", needed=9, available=4, unit="tokens")
    assert (error.needed, error.available, error.unit) == (9, 4, "tokens")


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copied", "sent"])
def test_an_error_reaches_another_process_whole(twin):
    for error in (
        errors.ParameterError("n=0 is too few", "ask for one", param="n"),
        errors.ContextOverflow("too long", "shorten it", needed=9, available=4, unit="tokens"),
        errors.RemoteBusy("it has no room", status=503),
    ):
        found = twin(error)
        assert type(found) is type(error) and str(found) == str(error) and vars(found) == vars(error)


def test_media_in_memory_are_taken_as_their_bytes():
    for kind in (types.Image, types.Video):
        file = io.BytesIO(b"content")
        file.read(3)
        assert kind(file).source == b"content" and kind(file) == kind(b"content")


def test_the_layers_contract_names_every_room():
    settings = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    listed = [room.strip() for level in contract["layers"] for room in level.split("|")]
    named = {room.strip("()") for room in listed}
    rooms = {f.stem for f in ROOT.iterdir() if (f.suffix == ".py" or (f.is_dir() and any(f.glob("*.py")))) and f.stem[0] != "_"}
    assert rooms <= named and {room for room in listed if room[0] != "("} <= rooms
