"""A chat template: where a checkpoint keeps it, and how it is rendered safely."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from mirada.errors import CheckpointError, MessageError
from mirada.prompt import sandbox
from mirada.prompt.format import PromptFormat
from mirada.prompt.spelling import content_of
from mirada.prompt.tokenizer_files import NAMES, read_json

MAX_SOURCE = 1024 * 1024
"""Characters of a template's source."""


class Template:
    """Compiled once, rendered often; safe to share between threads.

    ``source`` is the jinja text, ``origin`` says where it came from (for messages), ``names`` are the ``eos_token`` and
    the like that templates may ask for.
    """

    def __init__(self, source: str, origin: str = "chat template", names: Mapping[str, str] | None = None) -> None:
        """Raises CheckpointError when the source is too long or no jinja."""
        if len(source) > MAX_SOURCE:
            raise CheckpointError(
                f"{origin} has {len(source)} characters", f"a template may have {MAX_SOURCE}; use the release's own"
            )
        self.source, self.origin, self.names = source, origin, dict(names or {})
        self._environment = sandbox.Environment()
        self._lock = threading.Lock()
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            line = getattr(error, "lineno", None)
            raise CheckpointError(
                f"{origin} is no valid template{f' (line {line})' if line else ''}: {error}",
                "use the release's own template",
            ) from error

    def __reduce__(self) -> tuple[type[Template], tuple[str, str, dict[str, str]]]:
        return Template, (self.source, self.origin, self.names)

    @classmethod
    def from_directory(cls, path: str | Path, form: PromptFormat) -> Template:
        """The template of a checkpoint: the processor's (``chat_template.json``, ``chat_template.jinja``), else that of
        ``tokenizer_config.json`` if it can place pictures, else the family's own (``form.template``)."""
        path = Path(path)
        config = path / "tokenizer_config.json"
        settings = read_json(config) if config.exists() else {}
        names = {name: content_of(settings[name]) for name in NAMES if settings.get(name)}
        if (path / "chat_template.json").exists():
            source = _default(read_json(path / "chat_template.json").get("chat_template"), path / "chat_template.json")
            return cls(source, str(path / "chat_template.json"), names)
        if (path / "chat_template.jinja").exists():
            return cls(_read(path / "chat_template.jinja"), str(path / "chat_template.jinja"), names)
        if settings.get("chat_template"):
            source = _default(settings["chat_template"], config)
            if form.image_pad in source:
                return cls(source, str(config), names)
        return cls(form.template, "the family's own template", names)

    def knows(self, name: str) -> bool:
        """Whether the template mentions a variable such as ``tool_calls``."""
        return name in self.source

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Messages in the form of transformers (role, content, ...) -> text.

        Raises MessageError when the template refuses the chat, CheckpointError when the template fails or breaks a bound.
        """
        with self._lock:
            self._environment.budget = sandbox.Budget(_num_items(messages))
            try:
                return self._joined(self.names | variables | {"messages": list(messages)})
            except sandbox.Refused as error:
                raise MessageError(
                    f"the chat template refuses this chat: {error}", f"the rule is set by {self.origin}"
                ) from error
            except (SecurityError, RecursionError, MemoryError) as error:
                raise CheckpointError(
                    f"{self.origin} was stopped: {error}",
                    "it is not safe to run; use the template of the model's release",
                ) from error
            except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
                raise CheckpointError(
                    f"{self.origin} fails on this chat: {type(error).__name__}: {error}",
                    "check the roles and parts of the chat, or use the template of the model's release",
                ) from error

    def _joined(self, variables: dict[str, Any]) -> str:
        pieces, size = [], 0
        for piece in self._template.generate(variables):
            size += len(piece)
            self._environment.budget.charge(1)
            self._environment.budget.room(size)
            pieces.append(piece)
        return "".join(pieces)


def _num_items(messages: Sequence[Mapping[str, Any]]) -> int:
    contents = [message.get("content") for message in messages]
    return len(contents) + sum(len(content) for content in contents if isinstance(content, list))


def _default(value: Any, path: Path) -> str:
    # Several templates may be listed by name; the one called "default" is for chats.
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, Mapping)}
    if isinstance(value, Mapping):
        value = value.get("default")
    if not isinstance(value, str):
        raise CheckpointError(f"{path} holds no template named 'default'", "put the jinja text under the key chat_template")
    return value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "copy the file again from the release") from error
