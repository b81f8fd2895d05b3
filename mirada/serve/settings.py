"""What may be set about a server; the defaults are safe for a machine on which strangers can reach nothing."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mirada.config import env
from mirada.errors import SettingsError
from mirada.serve.window import LiveLimits
from mirada.types import Thinking

MB = 1 << 20
KEYS_VARIABLE = "MIRADA_API_KEYS"
LEAST_KEY = 8
MEDIA = ("fps", "nframes", "min_pixels", "max_pixels")


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Bounds and rules of one server. Raises SettingsError for a value out of range, and for a ``host`` that other machines
    reach without an API key."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Any one of them opens the door; none is needed on a loopback address."""
    unknown_parameters: Literal["refuse", "warn"] = "refuse"
    """Parameters of a request that nobody knows: an error 400, or named in the header ``X-Mirada-Ignored``."""
    max_tokens: int | None = None
    """Longest answer where a request names none; None: what the model's context leaves."""
    thinking: Thinking | None = None
    """auto, on or off, where a request says nothing of it."""
    fps: float | None = None
    nframes: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    """Settings of pictures and videos where neither they nor the request have one; None: the model's own."""
    max_requests: int = 256
    """Requests under way, those that wait included; one more is answered 429."""
    max_body_bytes: int = 100 * MB
    """Largest body of one request."""
    max_bodies_bytes: int = 512 * MB
    """Bodies of all requests under way together, with 256 bytes for each of their values; what does not fit is answered 429."""
    max_body_values: int = 200_000
    """Values of JSON (texts, numbers, objects, lists) in one body; each takes many times its bytes in memory."""
    max_tools: int = 128
    """Tools of one request, as OpenAI's; each has a schema that is read, and compiled where a call must follow it."""
    max_connections: int = 512
    """Connections that are open at once, idle ones included; for one more, the one closes that has waited longest without a
    whole request."""
    header_seconds: float = 20.0
    """In which the head of a request must have arrived."""
    body_seconds: float = 60.0
    """In which a body must have arrived."""
    send_seconds: float = 60.0
    """In which a client must take what is sent to it; then it counts as gone."""
    stall_seconds: float = 300.0
    """After which a step of an engine that does not end counts as hanging, and ``/ready`` says no."""
    sleep: bool = False
    """Whether ``/sleep`` and ``/wake_up`` are there; they need an API key."""
    adapter_root: Path | None = None
    """Folder below which ``/v1/load_lora_adapter`` finds adapters; it needs an API key. None: no such route."""
    drain_seconds: float = 120.0
    """How long requests under way may take to end once the server was told to stop."""
    live: LiveLimits = field(default_factory=LiveLimits)
    """Bounds of the connections of ``/v1/live``."""

    def __post_init__(self) -> None:
        for name in (
            "max_tokens", *MEDIA, "max_requests", "max_body_bytes", "max_bodies_bytes", "max_body_values", "max_connections",
            "max_tools",
            "header_seconds", "body_seconds", "send_seconds", "stall_seconds",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SettingsError(f"server setting {name}={value!r} is out of range", "give a number above 0")
        if self.drain_seconds < 0 or not 0 <= self.port <= 65535:
            name = "drain_seconds" if self.drain_seconds < 0 else "port"
            raise SettingsError(f"server setting {name}={getattr(self, name)!r} is out of range", "see docs/serve.md")
        if self.fps is not None and self.nframes is not None:
            raise SettingsError("server settings fps and nframes are both given", "give one of them")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise SettingsError(f"server setting min_pixels={self.min_pixels} is above max_pixels", "swap them")
        object.__setattr__(self, "api_keys", tuple(self.api_keys))
        for number, key in enumerate(self.api_keys, 1):
            if len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise SettingsError(
                    f"API key {number} does not do",
                    f"give at least {LEAST_KEY} characters of printable ASCII without spaces: openssl rand -hex 24",
                )
        if not self.api_keys and not is_loopback(self.host):
            raise SettingsError(
                f"host {self.host!r} can be reached from other machines, and no API key is set",
                f"give --api-key-file FILE, or set {KEYS_VARIABLE}; or leave the host at 127.0.0.1",
            )

    def completed(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A request's body with the settings of media and thinking that it leaves to the server."""
        kwargs = body.get("mm_processor_kwargs")
        given = {**(kwargs if isinstance(kwargs, Mapping) else {}), **body}
        said = {name for name, value in given.items() if value is not None}
        rate, mode = {"fps", "nframes"}, {"thinking", "reasoning_effort", "chat_template_kwargs"}
        said |= (rate if said & rate else set()) | (mode if said & mode else set())
        own = {name: getattr(self, name) for name in (*MEDIA, "thinking") if name not in said}
        return {**body, **{name: value for name, value in own.items() if value is not None}}

    @property
    def names(self) -> tuple[str, ...]:
        """Every setting."""
        return tuple(one.name for one in fields(self))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def find_keys(given: tuple[str, ...] = (), file: str | Path | None = None) -> tuple[str, ...]:
    """API keys that were given, those in ``file`` (one a line, ``#`` begins a comment) and those in ``MIRADA_API_KEYS``
    (with commas between). Raises SettingsError for a file that cannot be read or that other users of the machine can."""
    keys = [*given, *(env(KEYS_VARIABLE, "") or "").split(",")]
    if file is not None:
        keys += _read(Path(file))
    return tuple(dict.fromkeys(key.strip() for key in keys if key.strip()))


def _read(file: Path) -> list[str]:
    try:
        mode, text = file.stat().st_mode, file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the file of API keys {str(file)!r} cannot be read: {error}", "check its path") from error
    if mode & 0o077:
        raise SettingsError(f"the file of API keys {str(file)!r} is open to other users", f"run: chmod 600 {file}")
    keys = [key for line in text.splitlines() if (key := line.partition("#")[0].strip())]
    if not keys:
        raise SettingsError(f"the file of API keys {str(file)!r} holds none", "write one a line")
    return keys
