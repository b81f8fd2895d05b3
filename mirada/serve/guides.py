"""From what a request asks its answer to look like to the guide that makes it so, or the error that names the parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mirada.errors import ParameterError, SettingsError
from mirada.records.request import ChatRequest, RequestOptions

if TYPE_CHECKING:
    from mirada.engine.guide import Guide
    from mirada.engine.llm import VLM


def asked(options: RequestOptions) -> dict[str, Any]:
    """What ``VLM.submit`` and ``VLM.guide`` are to be told of thinking and tools."""
    named = {"name": options.tool_name}
    return {
        "thinking": options.thinking,
        "tools": options.tools or None,
        "tool_choice": named if options.tool_choice == "named" else options.tool_choice,
        "parallel_tool_calls": options.parallel_tool_calls,
    }


def guide_for(vlm: VLM, request: ChatRequest) -> Guide | None:
    """A fresh guide for one reply, or None where it may be anything. Raises ParameterError for what cannot be promised, and
    NotAvailable without the package that promises it."""
    options = request.options
    try:
        return vlm.guide(request.sampling, **asked(options))
    except SettingsError as error:
        param = _tool_of(options, error.problem) or options.form_param or "tool_choice"
        said = error.problem.replace(request.sampling.form or "tool_choice", param, 1)
        raise ParameterError(said, error.fix, param=param) from error


def _tool_of(options: RequestOptions, problem: str) -> str | None:
    """The parameter of the tool whose arguments the problem is about."""
    for index, tool in enumerate(options.tools):
        if options.form_param is None and f"tool {_name(tool)!r} " in problem:
            return f"tools[{index}].function.parameters"
    return None


def _name(tool: Mapping[str, Any]) -> str:
    return tool["function"]["name"]
