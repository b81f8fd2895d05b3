"""What replaces a Linear from outside: weights that a checkpoint stores as packed integers or 8-bit floats.

``METHODS`` names the formats (``quant_method`` of ``quantization_config``). A method reads its settings into a
``method.Scheme``, which says what each tensor is stored as and turns that into the one canonical form, ``packed.Packed``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mirada.adapt.method import Scheme
from mirada.errors import ConfigError, nearest
from mirada.keys import Keys
from mirada.table import Table

METHODS = Table(
    "quantisation method",
    {
        "awq": "mirada.adapt.awq:read",
        "gptq": "mirada.adapt.gptq:read",
        "fp8": "mirada.adapt.fp8:read",
        "compressed-tensors": "mirada.adapt.compressed:read",
        "mirada_int8_rows": "mirada.adapt.rows:read",
    },
)
KEYS = ("quantization_config", "compression_config")
"""Keys of config.json that are read here; a family ignores them."""
_REFUSED = {
    "bitsandbytes": "bitsandbytes packs weights for its own kernels",
    "marlin": "marlin stores weights in the order of one GPU kernel",
    "gptq_marlin_24": "marlin stores weights in the order of one GPU kernel",
    "modelopt": "modelopt (NVFP4 and per-tensor fp8) is not read",
    "nvfp4": "NVFP4 is not read",
    "exl2": "exllama's own format is not read",
    "exl3": "exllama's own format is not read",
}

__all__ = ["KEYS", "METHODS", "Scheme", "read", "without"]


def read(mapping: Mapping[str, Any], where: str = "config.json") -> Scheme | None:
    """The scheme that config.json names, or None if its weights are plain.

    It may stand at the top or in ``text_config``. ConfigError names what is not supported, and what is.
    """
    name = next((key for key in KEYS if mapping.get(key)), None)
    if name is None:
        inner = mapping.get("text_config")
        return read(inner, f"{where}: text_config") if isinstance(inner, Mapping) else None
    found = mapping[name]
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}: {name} holds a {type(found).__name__}", "it must be a mapping of settings")
    keys = Keys(found, f"{where}: {name}")
    method = keys.take("quant_method", str)
    if method not in METHODS:
        why = f" ({_REFUSED[method]})" if method in _REFUSED else ""
        raise ConfigError(f"{keys.where}: quant_method {method!r} is not supported{why}", nearest(method, METHODS))
    scheme: Scheme = METHODS[method](keys)
    keys.done()
    return scheme


def without(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model with plain weights."""
    made = {key: value for key, value in mapping.items() if key not in KEYS}
    inner = made.get("text_config")
    return made | {"text_config": without(inner)} if isinstance(inner, Mapping) else made
