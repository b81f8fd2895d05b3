"""The few words of JSON Schema that the server's OpenAPI document is written in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def text(**more: Any) -> Schema:
    return {"type": "string", **more}


def whole(least: int | None = None, most: int | None = None, **more: Any) -> Schema:
    return {"type": "integer"} | _bounds(least, most) | more


def number(least: float | None = None, most: float | None = None, **more: Any) -> Schema:
    return {"type": "number"} | _bounds(least, most) | more


def flag(**more: Any) -> Schema:
    return {"type": "boolean", **more}


def one_of(*values: Any, **more: Any) -> Schema:
    return {"enum": list(values), **more}


def many(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def thing(needed: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None, **more: Any) -> Schema:
    """An object with these fields and no others, unless ``more`` says otherwise. The optional ones may be null."""
    fields = {**needed, **{name: maybe(one) for name, one in (optional or {}).items()}}
    return {"type": "object", "required": list(needed), "properties": fields, "additionalProperties": False, **more}


def loose(needed: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """``thing`` that may hold anything beside."""
    made = thing(needed, optional)
    del made["additionalProperties"]
    return made


def told(needed: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """An object of an answer: later versions may say more."""
    return {"type": "object", "required": list(needed), "properties": {**needed, **(optional or {})}}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _bounds(least: float | None, most: float | None) -> Schema:
    return ({} if least is None else {"minimum": least}) | ({} if most is None else {"maximum": most})


ANYTHING: Schema = {}
OBJECT: Schema = {"type": "object"}
