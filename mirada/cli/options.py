"""Options that several commands take: each is written once, here, and so are the two things they say: who answers
(``Who``), and how (``How``).

Nothing heavier than typer is imported here; ``mirada --help`` stays quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mirada.errors import SettingsError, nearest
from mirada.types import Image, Part, Sampling, Thinking, Video

if TYPE_CHECKING:
    import mirada
    from mirada.client import HttpClient
    from mirada.media.limits import FetchLimits

MODES = ("auto", "on", "off")

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="'mini' (default), a checkpoint's folder, or org/name; with --url as the server says."),
]
Url = Annotated[str | None, typer.Option("--url", help="Ask a server that speaks OpenAI's API: http://host:8000/v1")]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", help="Key of --url. Better kept in MIRADA_API_KEY: others see this line.")
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or mps. Default: the best there is.")]
Quant = Annotated[
    str | None, typer.Option("--quant", help="int8, int4 (int4:64) or exact: how a CPU keeps the matrices. Default: as stored.")
]
Kv = Annotated[
    str | None, typer.Option("--kv", help="auto or int8: how keys and values of past tokens are kept. Default: auto.")
]
Adapter = Annotated[
    str | None, typer.Option("--adapter", help="A LoRA adapter's folder, or NAME=FOLDER; with --url as the server names it.")
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="NAME=FOLDER of a LoRA adapter (of several models: MODEL:NAME=FOLDER); may be given again."
        " Requests name it as adapter, or as their model.",
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 always takes the likeliest token.")]
Think = Annotated[
    str | None, typer.Option("--thinking", help="on, off or auto: think before answering. Default: auto, the model chooses.")
]
Fps = Annotated[float | None, typer.Option("--fps", help="Frames to take per second of video.")]
Nframes = Annotated[int | None, typer.Option("--nframes", help="Frames to take of a video in all, instead of --fps.")]
MinPixels = Annotated[int | None, typer.Option("--min-pixels", help="Least area of a picture or frame after resizing.")]
MaxPixels = Annotated[int | None, typer.Option("--max-pixels", help="Largest area of a picture or frame after resizing.")]


@dataclass(frozen=True, slots=True)
class Who:
    """A model in this process, or a server's. Raises SettingsError for options of the one given with the other."""

    model: str | None = None
    device: str | None = None
    quant: str | None = None
    kv: str | None = None
    adapter: str | None = None
    url: str | None = None
    api_key: str | None = None

    def __post_init__(self) -> None:
        if self.url is None:
            if self.api_key is not None:
                raise SettingsError("--api-key is for a server, and none is given", "add --url")
            return
        for name in ("device", "quant", "kv"):
            if getattr(self, name) is not None:
                raise SettingsError(f"--{name} is for a model in this process, and --url names a server", "leave one out")
        if self.adapter is not None and "=" in self.adapter:
            raise SettingsError(f"--adapter {self.adapter!r} has a folder, and --url names a server", "give its name alone")

    def open(self, workers: int | None = None, limits: FetchLimits | None = None) -> tuple[mirada.VLM | HttpClient, str | None]:
        """Who answers, to be closed, and the adapter that requests name. ``workers``: see ``EngineSettings``. ``limits``: of
        media, in this process. Raises MiradaError."""
        if self.url is not None:
            from mirada.client import HttpClient  # httpx takes a tenth of a second to load

            return HttpClient(self.url, self.api_key, self.model), self.adapter
        import mirada
        from mirada.engine.settings import EngineSettings

        adapters = {} if self.adapter is None else dict([named_adapter(self.adapter)])
        engine = EngineSettings(workers=workers, **given(kv=self.kv))
        made = mirada.VLM(
            self.model or "mini", device=self.device, quant=self.quant, engine=engine, adapters=adapters, **given(limits=limits)
        )
        return made, next(iter(adapters), None)


@dataclass(frozen=True, slots=True)
class How:
    """Sampling, thinking, and settings of pictures and videos by name. Raises SettingsError."""

    sampling: Sampling = field(default_factory=Sampling)
    thinking: Thinking = "auto"
    media: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, max_tokens: int, temperature: float, thinking: str | None, **media: float | None) -> How:
        """As the options say it; what was not given is left to the model."""
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
        return cls(sampling, mode(thinking) or "auto", given(**media))

    def part(self, kind: type[Image] | type[Video], source: Any) -> Image | Video:
        """A picture or video with those settings that its kind has."""
        from mirada.engine import inputs

        own = {name: value for name, value in self.media.items() if name in kind.__dataclass_fields__}
        (made,) = inputs.with_settings([kind(source)], own)
        return cast(Image | Video, made)

    def parts(self, sources: Sequence[str], limits: FetchLimits) -> list[Image | Video]:
        """What ``sources`` hold. Raises MediaError."""
        from mirada.engine import inputs

        found: list[Part] = [inputs.as_part(source, limits) for source in sources]
        return [self.part(type(one), one.source) for one in found if isinstance(one, Image | Video)]


def given(**options: Any) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in options.items() if value is not None}


def mode(thinking: str | None) -> Thinking | None:
    """``--thinking``, checked. Raises SettingsError."""
    if thinking is not None and thinking not in MODES:
        raise SettingsError(f"--thinking {thinking!r} is unknown", nearest(thinking, MODES))
    return cast("Thinking | None", thinking)


def named_adapter(text: str) -> tuple[str, Path]:
    """(name, folder) of ``NAME=FOLDER``, or of a folder alone, which gives its name. Raises SettingsError, before a model is
    opened in vain."""
    name, equals, path = text.partition("=")
    folder = Path(path if equals else text)
    if not equals:
        name = folder.name
    if not name or not (folder / "adapter_config.json").is_file():
        raise SettingsError(
            f"--adapter {text!r}: no adapter lies at {str(folder)!r}",
            "give NAME=FOLDER, with adapter_config.json in the folder",
        )
    return name, folder
