"""What the texts promise is there: files, names, options, commands."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import mirada
from mirada.cli import commands

ROOT = Path(mirada.__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EACH = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def test_the_readme_is_short_and_begins_with_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    assert [line.split("#")[0].strip() for line in blocks(ROOT / "README.md", "")[0].splitlines()] == ["make demo", "make test"]
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {"demo", "test", "check"} <= set(targets)


@EACH
def test_links_and_paths_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:mirada|tests|docs|recipes|benchmarks)/[\w./]*\w)`", page.read_text()):
        if "NAME" not in path:
            assert (ROOT / path).exists(), path


@EACH
def test_python_snippets_import_what_exists(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


@EACH
def test_options_of_the_command_exist(page):
    known = {word for command in commands.app.registered_commands for word in _options(command.callback)}
    for block in blocks(page, ""):
        for line in block.splitlines():
            if line.startswith("mirada "):
                shown = re.split(r"\s{3,}|#", line)[0]
                command = shown.split()[1]
                assert command in {c.callback.__name__ for c in commands.app.registered_commands if c.callback}, line
                assert set(re.findall(r"--[a-z-]+", shown)) <= known, line


def _options(function) -> set[str]:
    found = set()
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        for extra in getattr(parameter.annotation, "__metadata__", ()):
            # inside Annotated, typer keeps the first name where a default would stand
            names = (getattr(extra, "default", None), *(getattr(extra, "param_decls", None) or ()))
            found |= {one for name in names if isinstance(name, str) for one in name.split("/")}
    return found


def test_every_module_says_what_it_is():
    for file in (ROOT / "mirada").rglob("*.py"):
        assert ast.get_docstring(ast.parse(file.read_text())), file
