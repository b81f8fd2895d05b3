"""Answers of a promised form: JSON of a schema, a regular expression, one of some texts, a Lark grammar, or a tool call.

llguidance (extra ``serve``) says after each token which may follow. Its view of a vocabulary is made once per model, and the
grammars that were compiled last are kept. W words of 32 bits, one bit a token.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mirada.engine.guide import Guide
from mirada.engine.thought import AfterThought, Vocabulary
from mirada.errors import NotAvailable, SettingsError, nearest
from mirada.prompt.calls import NAME, NUMBER, spelled, written
from mirada.prompt.format import PromptFormat
from mirada.prompt.parse import KINDS, Kind
from mirada.prompt.tokenizer import Tokenizer
from mirada.types import Sampling, Thinking

KEPT = 64
"""Compiled grammars kept."""
KEPT_CHARS = 4 * 1024 * 1024
"""Characters of all kept grammars together; what they compile to grows with them."""
MOST_STATES = 50_000
"""States that the lexer of one reply may build (1 to 2 kB each), a fifth of llguidance's own bound."""
SPACE = r"[ \t\r\n]{0,40}"
"""What may stand between two parts of JSON. Bounded: a weak model would otherwise indent for ever."""
_NUMBER = "/[0-9]{1,3}/"

Tools = Sequence[Mapping[str, Any]]
ToolChoice = str | Mapping[str, Any]
"""auto, none, required, or a mapping that names a function as OpenAI's does."""


class Structures:
    """Guides for one model. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, form: PromptFormat, eos: Collection[int]) -> None:
        self._tokenizer, self._form = tokenizer, form
        self.vocabulary = Vocabulary(tokenizer, eos)
        self._changed = threading.Condition()
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._under_way: set[str] = set()
        """Grammars that a thread compiles now."""
        self._one_view = threading.Lock()
        self._view: Any = None

    def guide(
        self,
        sampling: Sampling,
        thinking: Thinking = "auto",
        tools: Tools | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
    ) -> Guide | None:
        """A fresh guide for one reply; None where it may be anything. Reasoning, where the family and ``thinking`` have any,
        comes first and is free (``engine.thought``).

        Raises SettingsError for what cannot be promised, saying why; NotAvailable without llguidance.
        """
        mode, name = check_choice(tools, tool_choice)
        if mode in ("required", "named"):
            if sampling.form is not None:
                raise SettingsError(f"{sampling.form} and tool_choice both say what the answer must be", "give one of them")
            chosen = [tool for tool in tools or () if name is None or _function(tool)["name"] == name]
            grammar, control = self._calls(chosen, parallel_tool_calls and name is None)
            what = "tool_choice"
        elif sampling.form is not None:
            what, control = sampling.form, frozenset()
            grammar = _WRITERS[what](getattr(sampling, what))
        else:
            return None
        compiled = self._compiled(what, grammar, control)

        def fresh() -> Matched:
            return Matched(compiled.deep_copy(), self.vocabulary, control)

        if thinks(self._form, thinking):
            tags = (self._form.think, self._form.analysis)
            return AfterThought(fresh, [tag for tag in tags if tag.open], self.vocabulary, first=thinking == "on")
        return fresh()

    def _calls(self, tools: Tools, several: bool) -> tuple[str, frozenset[int]]:
        """The grammar of calls as the family writes them, and the control tokens in it."""
        control: set[int] = set()
        calls, parts = [], []
        before, after, between = written(self._form)
        for index, tool in enumerate(tools):
            function = _function(tool)
            where = f"the parameters of the tool {function['name']!r}"
            schema = _arguments(function.get("parameters"), where)
            parts.append((where, schema))
            name = _quoted(spelled(self._form, function["name"]))
            lark = " ".join((*self._literal(before, control, name), f"%json {schema}", *self._literal(after, control)))
            calls.append(f"call_{index}: {lark}\n")
        one = "(" + " | ".join(f"call_{index}" for index in range(len(tools))) + ")"
        more = " ".join((*self._literal(between, control), one))
        section = self._form.call_section
        begin, end = (" ".join(self._literal(tag, control)) for tag in (section.open, section.close))
        grammar = f"start: {begin} {one} {f'({more})*' if several else ''} {end}\n" + "".join(calls)
        if grammar not in self._kept:  # very many tools would drive one another out, and be compiled again for each reply
            for where, schema in parts:  # an error names its tool
                self._compiled(where, _library().LLMatcher.grammar_from_json_schema(schema), frozenset())
        return grammar, frozenset(control)

    def _literal(self, text: str, control: set[int], name: str = "") -> Iterator[str]:
        """Text as parts of a Lark rule: strings, control tokens by their ids, ``name`` and any number in their places."""
        for piece, token in self._tokenizer.split(text):
            if token is not None:
                control.add(token)
                yield f"<[{token}]>"
                continue
            for part in re.split(f"([{NAME}{NUMBER}])", piece):
                if part:
                    yield {NAME: name, NUMBER: _NUMBER}.get(part) or _quoted(part)

    def _compiled(self, what: str, grammar: str, control: frozenset[int]) -> Any:
        """A matcher at its beginning, to be copied. Who wants the same grammar at the same time waits for it, nobody else does.
        Raises SettingsError."""
        with self._changed:
            self._changed.wait_for(lambda: grammar not in self._under_way)
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
                return self._kept[grammar]
            self._under_way.add(grammar)
        try:
            compiled = self._checked(what, grammar, control)
            with self._changed:
                self._keep(grammar, compiled)
        finally:
            with self._changed:
                self._under_way.discard(grammar)
                self._changed.notify_all()
        return compiled

    def _keep(self, grammar: str, compiled: Any) -> None:
        self._kept[grammar] = compiled
        while len(self._kept) > KEPT or (len(self._kept) > 1 and sum(map(len, self._kept)) > KEPT_CHARS):
            self._kept.popitem(last=False)

    def _checked(self, what: str, grammar: str, control: frozenset[int]) -> Any:
        llguidance = _library()
        with self._one_view:
            if self._view is None:
                self._view = _view(self._tokenizer, self.vocabulary)
        limits = llguidance.LLParserLimits(max_lexer_states=MOST_STATES, verbose_errors=False)
        with _panics(what):
            made = llguidance.LLMatcher(self._view, grammar, log_level=0, limits=limits)
            if made.is_error():
                raise _refused(what, made.get_error())
            words = np.zeros(-(-self.vocabulary.size // 32), np.int32)
            Matched(made.deep_copy(), self.vocabulary, control).mask(words)
        if not words.any():
            raise _refused(what, "no text fulfils it")
        return made


def thinks(form: PromptFormat, thinking: Thinking) -> bool:
    """Whether a reply may begin with reasoning: asked for, or left to a model that can. One that offers ``off`` and no ``on``
    (Qwen2-VL) never does; one that offers neither (Kimi-VL) may."""
    modes = dict(form.thinking_suffix)
    return bool(form.think.open) and (thinking == "on" or (thinking == "auto" and ("on" in modes or "off" not in modes)))


def counted(form: PromptFormat, sampling: Sampling, thinking: Thinking, mode: str) -> tuple[Kind, ...]:
    """Tags that count when a reply is read; where an answer has a promised form, whatever it holds is the answer."""
    thoughts: tuple[Kind, ...] = ("think", "analysis") if thinks(form, thinking) else ()
    if mode in ("required", "named"):
        return (*thoughts, "call")
    if sampling.form is not None:
        return thoughts
    return tuple(kind for kind in KINDS if kind != "call" or mode != "none")


def check_choice(tools: Tools | None, choice: Any) -> tuple[str, str | None]:
    """(mode, name of the function that must be called). Raises SettingsError."""
    if isinstance(choice, str) and choice in ("auto", "none"):
        return choice, None
    names = [_function(tool)["name"] for tool in tools or ()]
    if choice == "required":
        if not names:
            raise SettingsError("tool_choice='required' asks for a call, and there are no tools", "give tools")
        return choice, None
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise SettingsError(f"tool_choice={choice!r} is unknown", "give 'auto', 'none', 'required' or {'name': ...}")
    if name not in names:
        raise SettingsError(f"tool_choice names {name!r}, which is no tool", nearest(name, names))
    return "named", name


class Matched:
    """A Guide: what one matcher of llguidance allows, without control tokens but those named; the end only where it may be."""

    def __init__(self, matcher: Any, vocabulary: Vocabulary, control: frozenset[int] = frozenset()) -> None:
        self._matcher, self._vocabulary, self._control = matcher, vocabulary, control
        self._ended = False

    def mask(self, out: np.ndarray) -> None:
        """Raises ValueError where the grammar became too complex, or can only go wrong from here."""
        size = -(-self._vocabulary.size // 32)
        words = out if len(out) == size and out.flags.c_contiguous else np.zeros(size, np.int32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()
        words &= self._vocabulary.allowed(self._control, self._matcher.is_accepting())
        if words is not out:
            shared = min(size, len(out))
            out[:shared] |= words[:shared]

    def allows(self, token: int) -> bool:
        """Whether ``token`` may come next."""
        if token in self._vocabulary.eos:
            return self._matcher.is_accepting()
        fits = self._vocabulary.is_plain(token) or token in self._control
        return fits and not self._matcher.is_stopped() and self._matcher.validate_tokens([token]) == 1

    def accept(self, token: int) -> None:
        if token in self._vocabulary.eos:
            if not self._matcher.is_accepting():
                raise ValueError("the reply ended before it was whole")
            self._ended = True
        elif not self._matcher.consume_token(token):
            self._check()

    @property
    def finished(self) -> bool:
        return self._ended or (self._matcher.is_stopped() and self._matcher.is_accepting())

    def forced(self) -> list[int]:
        if self.finished:
            return []
        tokens = self._matcher.compute_ff_tokens()
        known = all(self._vocabulary.is_plain(token) or token in self._control for token in tokens)
        return tokens if known else []

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error().strip().splitlines()[0])


def _view(tokenizer: Tokenizer, vocabulary: Vocabulary) -> Any:
    """The vocabulary as llguidance sees it: control tokens have no text, so that no grammar of a caller can name them."""
    llguidance = _library()

    class View:
        eos_token_id = min(vocabulary.eos)
        bos_token_id = None
        special_token_ids = sorted(vocabulary.eos)
        tokens = vocabulary.bytes

        def __call__(self, text: str) -> list[int]:
            if not isinstance(text, str):
                raise TypeError("text is a string")  # how llguidance learns what it may hand over
            return tokenizer.encode(text)

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(View()), eos_token=sorted(vocabulary.eos))


def _json_grammar(schema: Any) -> str:
    return _library().LLMatcher.grammar_from_json_schema(_json_text(schema))


def _json_text(schema: Any) -> str:
    """A schema as JSON, with our bounds of white space where it has none of its own."""
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise _refused("json_schema", "nothing fulfils it")
    own = schema.get("x-guidance") or {}
    if not isinstance(own, Mapping):
        raise _refused("json_schema", f"its x-guidance is a {type(own).__name__}")
    options = own if "whitespace_flexible" in own else {"whitespace_pattern": SPACE, **own}
    try:
        text = json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _refused("json_schema", f"it is no JSON: {error}") from error
    return _text(text)


def _arguments(parameters: Any, where: str) -> str:
    """The schema of a tool's arguments: an object; an empty one where nothing is said, as OpenAI has it."""
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping):
        raise _refused(where, f"they are a {type(parameters).__name__}")
    if not any(key in parameters for key in ("type", "$ref", "anyOf", "oneOf", "allOf", "const", "enum")):
        parameters = {"type": "object", **parameters}
    try:
        return _json_text(parameters)
    except SettingsError as error:
        raise SettingsError(error.problem.replace("json_schema", where, 1), error.fix) from error


def _choice_grammar(texts: Sequence[str]) -> str:
    return "start: " + " | ".join(map(_quoted, texts))


def _regex_grammar(pattern: str) -> str:
    return _library().LLMatcher.grammar_from_regex(_text(pattern))


def _lark_grammar(text: str) -> str:
    return _library().LLMatcher.grammar_from_lark(_text(text))


_WRITERS: dict[str, Callable[[Any], str]] = {
    "json_schema": _json_grammar, "regex": _regex_grammar, "choice": _choice_grammar, "grammar": _lark_grammar,
}  # fmt: skip


def _quoted(text: str) -> str:
    """A string of Lark."""
    return json.dumps(_text(text), ensure_ascii=False).replace("\x7f", "\\u007f")


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SettingsError("a text holds half of a surrogate pair, which is no character", "send valid Unicode") from error
    return text


def _function(tool: Any) -> Mapping[str, Any]:
    """What a tool says of its function. Raises SettingsError."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise SettingsError(
            "a tool names no function", 'give {"type": "function", "function": {"name": ..., "parameters": {}}}'
        )
    return function


@contextlib.contextmanager
def _panics(what: str) -> Iterator[None]:
    """A panic inside llguidance, which is no Exception, is an error of the grammar that led to it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SettingsError):
            raise
        raise _refused(what, str(error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise _refused(what, str(error)) from None


def _refused(what: str, why: str) -> SettingsError:
    reason = re.search(r"^\s*error: (.+)$", why, re.MULTILINE)  # of an expression, after the whole of it
    said = " ".join((reason[1] if reason else why).split())
    said = said if len(said) <= 300 else f"{said[:150]} … {said[-150:]}"
    return SettingsError(f"{what} cannot be kept to: {said}", "correct it, or leave it out")


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise NotAvailable("answers of a promised form need llguidance", "pip install 'mirada[serve]'") from error
    return llguidance
