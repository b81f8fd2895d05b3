"""A request that was read and checked, whoever brought it: the server, or a line of a batch. Knows nothing of HTTP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mirada.engine.together import Together
from mirada.errors import ParameterError, nearest
from mirada.records.request import ChatRequest, RequestOptions, request_from_openai
from mirada.serve import guides
from mirada.serve.settings import ServeSettings
from mirada.types import Sampling

if TYPE_CHECKING:
    from mirada.engine.handle import EngineHandle
    from mirada.engine.llm import VLM


@dataclass(frozen=True)
class Asked:
    """A request that was read and checked: of whom, what, and how."""

    name: str
    vlm: VLM
    chat: ChatRequest
    tenant: str
    """Whose request it is; caches are not shared among tenants."""

    @property
    def headers(self) -> dict[str, str]:
        """Parameters that were left aside, where the server allows that."""
        ignored = ", ".join(name for name in self.chat.options.unknown if name.isascii() and name.isprintable())
        return {"X-Mirada-Ignored": ignored[:1000]} if ignored else {}


def ask_of(
    vlm: VLM, name: str, body: Mapping[str, Any], settings: ServeSettings, adapter: str | None = None, tenant: str = ""
) -> Asked:
    """What ``body`` asks of ``vlm``, called ``name``. ``adapter``: the one that the name stands for. Raises MiradaError."""
    context = vlm.parts.context
    defaults = replace(vlm.recommended_sampling or Sampling(), max_tokens=min(settings.max_tokens or context, context))
    body = settings.completed(body)
    _check_tools(body.get("tools"), settings.max_tools)
    chat = request_from_openai(body, defaults=defaults, allow_unknown=settings.unknown_parameters == "warn")
    if adapter is not None:
        chat = chat._replace(options=_adapted(chat.options, adapter))
    options, parts = chat.options, vlm.parts
    if options.tools and options.tool_choice != "none" and not parts.renderer.template.knows("tools"):
        raise ParameterError(f"{name} takes no tools: its template has no place for them", "leave tools out", param="tools")
    modes = dict(parts.renderer.format.thinking_suffix)
    if options.thinking not in modes:
        param = options.thinking_param or "thinking"
        said = f"{param} asks for the thinking mode {options.thinking!r}, which {name} lacks"
        raise ParameterError(said, nearest(options.thinking, modes), param=param)
    if options.adapter is not None and options.adapter not in vlm.adapters:
        raise ParameterError(
            f"there is no adapter {options.adapter!r}", nearest(options.adapter, vlm.adapters), param="adapter"
        )
    return Asked(name, vlm, chat, tenant)


def _check_tools(tools: Any, most: int) -> None:
    """Raises ParameterError for more of them than one request may have."""
    if isinstance(tools, list) and len(tools) > most:
        raise ParameterError(f"tools holds {len(tools)}, and a request may have {most}", "leave some out", param="tools")


def _adapted(options: RequestOptions, adapter: str) -> RequestOptions:
    if options.adapter not in (None, adapter):
        raise ParameterError(
            f"the model is the adapter {adapter!r}, and adapter is {options.adapter!r}",
            "leave one of them out",
            param="adapter",
        )
    return replace(options, adapter=adapter)


def start(asked: Asked) -> list[EngineHandle]:
    """All choices of a request, each with a seed of its own. Raises MiradaError."""
    messages, sampling, options = asked.chat
    chosen = guides.asked(options)
    together = Together() if options.n > 1 else None

    def one(index: int) -> EngineHandle:
        own = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + index)
        guide = guides.guide_for(asked.vlm, asked.chat)
        return asked.vlm.submit(
            messages, own, guide=guide, adapter=options.adapter, salt=asked.tenant, together=together, **chosen
        )

    return [one(index) for index in range(options.n)]


def token_bytes(vlm: VLM) -> Callable[[int], bytes]:
    """The bytes behind a token id."""
    return lambda token: vlm.parts.renderer.tokenizer.decode_bytes((token,))
