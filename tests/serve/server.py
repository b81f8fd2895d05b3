"""A real server in a process of its own, for the tests: ``python server.py FOLDER [--key K]``.

``mini`` is the model inside the package. ``echo`` is the same weights under a template that takes tools; its answers are what
the last user's text has after ``say:``, forced token by token through the real engine and the real parser.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from oracle import Recorder
from serving import PLANTED
from tiny_adapters import make_adapter

import mirada
from mirada.engine.guide import allow
from mirada.media.limits import FetchLimits
from mirada.serve import ServeSettings, run, serve

TEMPLATE = (
    "{%- if tools -%}{{- '<|im_start|>system\\n' -}}{%- for tool in tools -%}{{- tool | tojson -}}{%- endfor -%}"
    "{{- '<|im_end|>\\n' -}}{%- endif -%}"
)


class Script:
    """A guide that says given tokens and ends."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.left = list(tokens)

    def mask(self, out) -> None:
        allow(out, self.left[:1])

    def accept(self, token: int) -> None:
        assert token == self.left.pop(0)

    @property
    def finished(self) -> bool:
        return not self.left

    def forced(self) -> list[int]:
        return self.left[:1]


class Echo(mirada.VLM):
    def submit(self, chat, sampling=None, *, guide=None, **more):
        last = next((message.text for message in reversed(chat) if message.role == "user"), "")
        if "defect:" in last:
            raise RuntimeError(f"{PLANTED} {last}")
        if guide is None and "say:" in last:
            guide = Script(self.parts.renderer.tokenizer.encode_control(last.partition("say:")[2]))
        return super().submit(chat, sampling, guide=guide, **more)


def make_echo(folder: Path) -> Path:
    """mini's files with a template that knows tools."""
    made = folder / "echo"
    shutil.copytree(Path(mirada.__file__).parent / "assets" / "mini", made)
    template = json.loads((made / "chat_template.json").read_text())["chat_template"]
    (made / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE + template}))
    return made


def record(file: Path) -> None:
    """Have the application of ``serve`` write down its answers, for ``oracle`` to judge."""
    make = run.create_app

    def recorded(*given):
        app = make(*given)
        app.add_middleware(Recorder, file=file)
        return app

    run.create_app = recorded


def main(folder: str, *keys: str) -> None:
    root = Path(folder)
    limits = replace(FetchLimits.serving(root), allow_private=True)
    engine = {"workers": 0}
    mini = mirada.VLM("mini", limits=limits, engine=engine)
    mini.load_adapter("loud", make_adapter(root / "loud", mini.parts.model, strength=3.0))
    models = {
        "mini": mini,
        "echo": Echo(make_echo(root), limits=limits, engine=engine),
    }
    settings = ServeSettings(port=0, api_keys=keys, drain_seconds=300)
    record(root / "answers.jsonl")
    serve(models, settings, lambda address: print(address, flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
