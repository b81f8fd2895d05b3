"""A jinja environment for chat templates that may be hostile: no access to Python, bounded time and memory.

Templates are written for the environment of transformers (``utils/chat_template_utils.py``): trimmed blocks, loop
controls, ``tojson`` without HTML escapes, ``raise_exception``, ``strftime_now`` and ``{% generation %}``. On top of
jinja's sandbox every loop, call and joined string is charged to a budget, and what can grow without bound in one step
(``"x" * 10**9``, ``center``, ``%``-padding) is checked before it happens or left out.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 400_000
STEPS_PER_ITEM = 200
MAX_CHARS = 8 * 1024 * 1024
"""Characters of one text."""
MAX_TOTAL_CHARS = 128 * 1024 * 1024
"""Characters of all texts together that one rendering makes; an item of a list counts as 64."""
MAX_SECONDS = 20.0
"""Processor seconds of one rendering."""
_UNBOUNDED_METHODS = frozenset(
    ("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "format", "format_map", "encode", "to_bytes")
)
_UNBOUNDED_FILTERS = ("center", "format", "indent", "wordwrap", "urlize", "xmlattr", "pprint", "batch", "slice")


class Refused(jinja2.TemplateError):
    """The template itself refuses the chat (``raise_exception``)."""


class Budget:
    """Steps, characters and seconds that one rendering may use."""

    def __init__(self, num_items: int = 0) -> None:
        """``num_items``: messages and parts of the chat; each allows for some more steps."""
        self.steps = 0
        self._limit = MAX_STEPS + STEPS_PER_ITEM * num_items
        self.chars = 0
        self._checked = 0
        self._end = time.thread_time() + MAX_SECONDS

    def charge(self, steps: int) -> None:
        self.steps += steps
        if self.steps > self._limit:
            raise SecurityError(f"it takes more than {self._limit} steps")
        if self.steps - self._checked > 200:
            self._checked = self.steps
            if time.thread_time() > self._end:
                raise SecurityError(f"it takes more than {MAX_SECONDS:g} s of processor time")

    def room(self, num_chars: int) -> None:
        """Check the size of a text before it is made."""
        if num_chars > MAX_CHARS:
            raise SecurityError(f"it makes a text of more than {MAX_CHARS} characters")

    def made(self, num_chars: int) -> None:
        """Charge a text that was made."""
        self.room(num_chars)
        self.chars += num_chars
        if self.chars > MAX_TOTAL_CHARS:
            raise SecurityError(f"it makes more than {MAX_TOTAL_CHARS} characters in all")
        self.charge(1 + num_chars // 256)


class _Charge(NodeTransformer):
    """Wraps loops, and all that makes a new text, so that they are charged."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "charge_loop", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, "charge_text", [], [], None, None, lineno=node.lineno)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        # Without an operand it is a filter block, which jinja needs as it is; its text was charged as it was made.
        return self.visit_Concat(node) if node.node is not None else self.generic_visit(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        return self.visit_Concat(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}``: some templates mark assistant text with it; the text passes through."""

    tags: ClassVar = {"generation"}

    def parse(self, parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class Environment(ImmutableSandboxedEnvironment):
    """One rendering at a time: ``budget`` belongs to the rendering under way (see ``Template.render``)."""

    intercepted_binops = frozenset(("*", "**", "%", "+"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation], optimized=False, cache_size=0
        )
        self.budget = Budget()
        for name in _UNBOUNDED_FILTERS:
            del self.filters[name]
        self.filters |= {
            "tojson": self._tojson,
            "join": self._join,
            "replace": self._replace,
            "charge_loop": self._charge_loop,
            "charge_text": self._charge_text,
        }
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise, "strftime_now": _now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Charge().visit(super()._parse(source, name, filename))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute, but for methods whose result has no bound."""
        if isinstance(obj, str | bytes | int) and attribute in _UNBOUNDED_METHODS:
            raise SecurityError(f"the method {attribute!r} is not allowed in a template")
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item, or an attribute by its name (``"x"["center"]``)."""
        return (
            self.getattr(obj, argument)
            if isinstance(obj, str) and isinstance(argument, str)
            else super().getitem(obj, argument)
        )

    def call(self, __context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call inside a template (also of a macro): charged, and refused where the result has no bound."""
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        self.budget.charge(5)
        if isinstance(owner, str) and name == "replace":
            return self._replace(owner, *args, **kwargs)
        if isinstance(owner, str) and name == "join" and args:
            return self._join(args[0], owner)
        return self._charge_text(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        """``* ** % +`` with operands that cannot blow up."""
        self.budget.charge(1)
        if operator == "%" and isinstance(left, str | bytes):
            raise SecurityError("formatting with % is not allowed in a template")
        if operator in ("*", "**"):
            numbers = [value for value in (left, right) if isinstance(value, int | float)]
            if len(numbers) < 2:
                sized = right if numbers and numbers[0] is left else left
                if numbers and hasattr(sized, "__len__"):
                    self.budget.room(len(sized) * max(0, int(numbers[0])) * (1 if isinstance(sized, str) else 64))
            elif operator == "**" and (abs(left) > 1e6 or abs(right) > 64):
                raise SecurityError("the power of these numbers is too large")
            elif max(abs(left), abs(right)) > 1e18:
                raise SecurityError("these numbers are too large")
        return self._charge_text(super().call_binop(context, operator, left, right))

    def _charge_loop(self, items: Iterable[Any]) -> Iterable[Any]:
        if hasattr(items, "__len__"):
            self.budget.charge(1 + len(items))  # type: ignore[arg-type]
            return items
        return self._counted(items) if hasattr(items, "__iter__") else items

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.budget.charge(1)
            yield item

    def _charge_text(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple | dict):
            self.budget.made(len(value) * (1 if isinstance(value, str) else 64))
        return value

    def _join(self, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        items = list(values) if attribute is None else [self.getitem(value, attribute) for value in values]
        texts = [str(value) for value in self._charge_loop(items)]
        self.budget.room(sum(map(len, texts)) + len(d) * len(texts))
        return self._charge_text(str(d).join(texts))

    def _replace(self, s: str, old: str, new: str, count: int = -1) -> str:
        text, old, new = str(s), str(old), str(new)
        self.budget.room(len(text) + text.count(old) * len(new))
        return self._charge_text(text.replace(old, new, -1 if count is None else count))

    def _tojson(
        self, value: Any, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys: bool = False
    ) -> str:
        if indent is not None and not 0 <= int(indent) <= 16:
            raise SecurityError(f"tojson with an indent of {indent} is not allowed")
        made = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return self._charge_text(made)


def _raise(message: str = "") -> None:
    raise Refused(str(message))


def _now(form: str = "%Y-%m-%d") -> str:
    if len(form) > 100:
        raise SecurityError("strftime_now with a form of more than 100 characters")
    return datetime.datetime.now().strftime(form)
