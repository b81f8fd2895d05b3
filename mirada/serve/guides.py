"""From what a request asks its answer to look like to the guide that makes it so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirada.errors import ParameterError
from mirada.records.request import RequestOptions

if TYPE_CHECKING:
    from mirada.engine.guide import Guide
    from mirada.engine.llm import VLM


def guide_for(vlm: VLM, options: RequestOptions) -> Guide | None:
    """A fresh guide for one reply, or None where it may be anything. Raises ParameterError for what cannot be promised."""
    if options.structure is not None:
        raise ParameterError(
            f"answers of a given form ({options.structure.kind}) cannot be promised yet",
            "describe the form in the message, and leave this out",
            param="response_format",
        )
    if options.tool_choice in ("required", "named"):
        raise ParameterError(
            "a tool call cannot be promised yet",
            "use tool_choice 'auto', and say in the message what to call",
            param="tool_choice",
        )
    return None
