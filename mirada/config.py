"""Typed settings (dataclass <- yaml <- ``--a.b=c``) and the one door to the environment.

Settings are frozen dataclasses; an unknown key, a missing one or a wrong type is a SettingsError that names the place.
Importing this module sets ``OMP_WAIT_POLICY=PASSIVE`` unless the user chose one: OpenMP threads that spin while they wait
cost up to 60 times beside a busy neighbour. It also bounds what oneDNN keeps of every shape it has multiplied (half a
megabyte each, without end under mixed traffic: 750 MB after 600 lengths of prompt, 127 MB so bounded, and no slower). torch
reads these once, when it loads, so this must come first.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import types
import typing
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union

from mirada.errors import MiradaError, SettingsError, nearest

T = TypeVar("T")

WAIT_POLICY_CHOSEN = "OMP_WAIT_POLICY" in os.environ
"""The user chose a policy; it was left as it is."""
TORCH_CAME_FIRST = "torch" in sys.modules
"""torch was loaded before Mirada, so a policy set here has no effect on it."""
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
for _cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "128")


def env(name: str, default: str | None = None) -> str | None:
    """The environment variable ``name``, or ``default``. Nothing else in the package reads the environment."""
    return os.environ.get(name, default)


def child_env(**changes: str) -> dict[str, str]:
    """The environment of this process with ``changes``, for a process that it starts."""
    return {**os.environ, **changes}


def parse(cls: type[T], mapping: Mapping[str, Any], where: str = "settings") -> T:
    """Build the dataclass ``cls`` from ``mapping``, checking keys and types all the way down.

    Fields may be str, int, float (takes an int), bool, None, Path, Literal, unions, tuples, lists, sequences (kept as tuples),
    mappings and other dataclasses. ``where`` names the mapping in messages. Raises SettingsError.
    """
    if not isinstance(mapping, Mapping):
        raise SettingsError(f"{where} is a {type(mapping).__name__}", "it must be a mapping of names to values")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    hints = _hints(cls)
    for key in mapping:
        if key not in fields:
            raise SettingsError(f"{where} has the unknown key {key!r}", nearest(str(key), fields))
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in mapping:
            raise SettingsError(f"{where} lacks {name!r}", f"give {name}, {_say(hints[name])}")
    values = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in mapping.items()}
    try:
        return cls(**values)
    except MiradaError:
        raise
    except (TypeError, ValueError) as error:  # a check in the dataclass's own __post_init__
        raise SettingsError(f"{where} is not valid: {error}", "correct the value it names") from error


def load(cls: type[T], path: str | Path | None = None, overrides: Iterable[str] = ()) -> T:
    """Settings from the yaml file ``path`` (defaults alone without one), then ``overrides`` such as ``--train.lr=1e-4``.

    Raises SettingsError for a file that cannot be read, an unknown key or a wrong type.
    """
    mapping = read_yaml(path) if path is not None else {}
    where = Path(path).name if path is not None else "settings"
    for override in overrides:
        _override(mapping, override, where)
    return parse(cls, mapping, where)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a yaml file: safe loader, YAML 1.2 scalars (``1e-4`` is a number, ``off`` is text), no key twice."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"the settings file {str(path)!r} cannot be read: {error}", "check its path and encoding"
        ) from error
    value = _from_yaml(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SettingsError(f"{path} holds a {type(value).__name__}", "its top level must be a mapping")
    return value


class _Flag(str):
    """Text from the command line: it is whatever the setting's type makes of it."""


def _override(mapping: dict[str, Any], override: str, where: str) -> None:
    path, equals, value = override.removeprefix("--").partition("=")
    keys = path.replace("-", "_").split(".")
    if not equals or not all(keys):
        raise SettingsError(f"the override {override!r} has no form that is known", "write it as --name=value or --a.b=value")
    for depth, key in enumerate(keys[:-1]):
        inner = mapping.setdefault(key, {})
        if not isinstance(inner, dict):
            raise SettingsError(
                f"{where}.{'.'.join(keys[: depth + 1])} is no group of settings", f"{override!r} cannot go inside"
            )
        mapping = inner
    mapping[keys[-1]] = _Flag(value)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` as ``hint`` asks, or SettingsError."""
    if isinstance(value, _Flag):
        return _convert_flag(hint, value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(hint, args, value, where)
    if origin is Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):
            raise _wrong(hint, value, where)
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else parse(hint, value, where)  # type: ignore[arg-type]
    if origin in (tuple, list, Sequence):
        return _convert_sequence(origin, args, hint, value, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(hint, value, where)
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is None or hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:  # a whole number may be longer than any fraction
                raise SettingsError(f"{where} is too large a number", "give one of at most 308 digits") from None
    elif hint is Path:
        if isinstance(value, str | Path):
            return Path(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise _wrong(hint, value, where)


def _convert_sequence(origin: type, args: tuple, hint: Any, value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong(hint, value, where)
    if origin is not tuple or args[1:] == (...,):
        kinds = (args[0],) * len(value)
    elif len(args) != len(value):
        raise SettingsError(f"{where} has {len(value)} values", f"give {len(args)}")
    else:
        kinds = args
    made = [_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))]
    return made if origin is list else tuple(made)


def _convert_union(hint: Any, args: tuple, value: Any, where: str) -> Any:
    # An exact type first, so that `int | float` keeps an int and `str | Path` a str.
    for arg in args:
        if isinstance(arg, type) and type(value) is arg:
            return value
    inner = None
    for arg in args:
        try:
            return _convert(arg, value, where)
        except SettingsError as error:
            if dataclasses.is_dataclass(arg) and isinstance(value, Mapping):
                inner = error  # says which key inside is wrong, which the general message could not
    raise inner or _wrong(hint, value, where)


def _convert_flag(hint: Any, flag: _Flag, where: str) -> Any:
    text = str(flag)
    try:
        value = _from_yaml(text, where)
    except SettingsError:
        value = text
    try:
        return _convert(hint, value, where)
    except SettingsError:
        if isinstance(value, str):
            raise
    try:
        return _convert(hint, text, where)  # `--name=7` where text is asked for
    except SettingsError:
        raise _wrong(hint, value, where) from None


def _wrong(hint: Any, value: Any, where: str) -> SettingsError:
    return SettingsError(f"{where} is {value!r} ({type(value).__name__})", f"it must be {_say(hint)}")


def _say(hint: Any) -> str:
    """A type, as a person would write it in a settings file."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_say(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin in (tuple, list, Sequence):
        return "a list of " + ", ".join(_say(arg) for arg in args if arg is not ...)
    if args and isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping" if args[0] in (str, Any) else f"a mapping whose keys are each {_say(args[0])}"
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path", type(None): "null"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _from_yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise SettingsError(f"{where} is not valid yaml: {error}", "correct the line it names") from error
    except RecursionError:
        raise SettingsError(f"{where} is nested too deeply", "write it flatter") from None


@cache
def _loader() -> Any:
    """The safe loader with YAML 1.2's plain scalars, refusing a key given twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, Hashable):
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is no name", key_node.start_mark)
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
                seen.add(key)
            return super().construct_mapping(node, deep)

    for tag, pattern, first in (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", "-+0123456789"),
        (
            "float",
            r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
            "-+.0123456789",
        ),
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("merge", r"<<", "<"),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), list(first))
    Loader.add_constructor("tag:yaml.org,2002:int", _yaml_int)
    Loader.add_constructor("tag:yaml.org,2002:float", _yaml_float)
    return Loader


def _yaml_int(loader: Any, node: Any) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 16) if text.lower().startswith("0x") else int(text)


def _yaml_float(loader: Any, node: Any) -> float:
    text = loader.construct_scalar(node).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan") if text[-1] in "fn" else text)
