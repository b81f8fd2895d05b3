"""The front door: pictures, videos and words in, answers out."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mirada.adapt.mode import parse as parse_mode
from mirada.engine import inputs, memory
from mirada.engine import sleep as sleeping
from mirada.engine.adapters import Adapters, check_adapter
from mirada.engine.counts import add, is_moment
from mirada.engine.graphs import Graphs, pool_bytes
from mirada.engine.guide import Guide
from mirada.engine.handle import EngineHandle
from mirada.engine.load import Parts, area_of, assemble, load
from mirada.engine.options import (
    EngineSettingsLike,
    LimitsLike,
    SamplingLike,
    bounded,
    engine_settings_of,
    label,
    limits_of,
    sampling_of,
)
from mirada.engine.parallel import lead, serve
from mirada.engine.prefix import PrefixCache, Weights
from mirada.engine.prepare import Preparing, are_remote, most_bytes
from mirada.engine.request import Requests
from mirada.engine.runner import Runner
from mirada.engine.sequence import Sequence
from mirada.engine.settings import EngineSettings
from mirada.engine.sleeper import Sleeper
from mirada.engine.step import Engine
from mirada.engine.structure import Structures, ToolChoice, check_choice, counted
from mirada.engine.thread import EngineThread
from mirada.engine.together import Follower, Together
from mirada.engine.vision import EncoderCache
from mirada.errors import MessageError, MiradaError, NotAvailable, RequestFailed
from mirada.layers.cache import make_cache
from mirada.layers.paged import Pages
from mirada.media.cache import PixelCache
from mirada.media.grid import Patches
from mirada.media.limits import FetchLimits
from mirada.media.pool import Pool
from mirada.media.rule import MediaRule
from mirada.models import rounding
from mirada.prompt.render import Tools
from mirada.types import ChatLike, Delta, Output, Prompt, Sampling, Thinking

if TYPE_CHECKING:
    from mirada.hub import HubOptions


class VLM(Sleeper):
    """A vision-language model, ready to answer. Implements ``types.Client``; safe to use from several threads.

    ``model`` is the directory of a checkpoint, ``"mini"``, the model inside the package, or ``"org/name"`` on a hub, fetched
    once (``hub``: source, revision, token, offline, cache_dir, endpoint). ``device``: cpu, cuda, mps
    (default: a GPU if there is one). ``device_map="auto"`` instead spreads the layers over all GPUs and the CPU. ``dtype``:
    float32, bfloat16, float16 (``auto``: as stored; on a CPU activations are float32, and bfloat16 matrices stay as they are,
    see ``precision``). ``attn``: sdpa, flash (bfloat16 or float16 on a
    GPU only), eager (as it is written; slow), auto (sdpa).
    ``min_pixels`` / ``max_pixels`` bound the resized area of every picture, or ``max_image_tokens`` in the model's own measure
    (see ``load.area_of``). ``widen``: matrices of a quantised checkpoint take
    ``dtype`` on load (faster, larger) instead of staying packed. ``quant`` says how matrices are kept: ``int8``, ``int4`` or,
    with groups of 64, ``int4:64``, and on a CPU ``exact`` (as stored, with float32 activations); see docs/quantise.md.
    ``load_in_8bit`` and ``load_in_4bit`` are other names of int8 and int4. ``limits`` say what may be fetched, and from where
    (``media.limits.FetchLimits``, or a mapping of its fields).
    ``adapters``: names and directories of LoRA adapters, see ``load_adapter``. ``tensor_parallel``: processes that share the
    model, of which this is the first; the others call ``follow`` (docs/parallel.md).
    ``engine``: bounds of the engine, see ``EngineSettings``. Its thread ends with ``close()``, at the end of a ``with`` block,
    or when neither this object nor a handle of it is left.
    Raises CheckpointError, NotAvailable, SettingsError or OutOfMemory.
    """

    def __init__(
        self,
        model: str | Path = "mini",
        *,
        device: Any = None,
        device_map: str | None = None,
        dtype: Any = "auto",
        attn: str = "auto",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_image_tokens: int | None = None,
        widen: bool = False,
        quant: str | None = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        tensor_parallel: int | None = None,
        hub: HubOptions | Mapping[str, Any] | None = None,
        limits: LimitsLike = None,
        engine: EngineSettingsLike = None,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> None:
        settings, allowed = engine_settings_of(engine), limits_of(limits)
        mode = parse_mode(quant, load_in_8bit, load_in_4bit)
        read = lambda: load(  # noqa: E731
            model, device, dtype, min_pixels, max_pixels, widen, hub, device_map, attn, mode, tensor_parallel, max_image_tokens
        )
        self._set_up(read(), allowed, settings, read, str(model))
        for name, path in (adapters or {}).items():
            self.load_adapter(name, path)

    @classmethod
    def from_parts(
        cls,
        model: Any,
        renderer: Any,
        rule: MediaRule | None = None,
        *,
        eos: Iterable[int] = (),
        limits: LimitsLike = None,
        engine: EngineSettingsLike = None,
    ) -> VLM:
        """An engine around a model in memory (it is not copied: what is trained answers with its weights of the moment).

        Beginnings of prompts and features are kept only where ``engine`` is given: torch's counters show most changes of
        weights, not those through ``parameter.data``. After one of these, call ``forget``.
        """
        made = cls.__new__(cls)
        settings = EngineSettings(prefix_cache_bytes=0, encoder_cache_bytes=0) if engine is None else engine_settings_of(engine)
        made._set_up(assemble(model, renderer, rule, eos), limits_of(limits), settings)
        return made

    @classmethod
    def follow(
        cls, model: str | Path, tensor_parallel: int, *, device: Any = None, dtype: Any = "auto", **options: Any
    ) -> None:
        """Hold this process's share of ``model`` and compute what the first process asks, until that closes its engine.

        ``options``: ``attn`` and ``hub`` as there. Raises what opening a model does, RequestFailed if the first is gone.
        """
        serve(load(model, device, dtype, tensor_parallel=tensor_parallel, **options))

    def _set_up(
        self,
        parts: Parts,
        limits: FetchLimits,
        settings: EngineSettings,
        read: Callable[[], Parts] | None = None,
        name: str = "",
    ) -> None:
        """``read`` gives the parts anew, where they are in files; ``name`` is what those were opened by."""
        self._label = label(name, parts)
        settings = memory.fitted(settings, next(parts.model.parameters()).device)
        self.parts, self._settings, self._read = bounded(parts, settings.max_length), settings, read
        self.limits = limits
        self._pool = Pool(settings.workers)
        self._requests = Requests(self.parts, self.limits, PixelCache(settings.pixel_cache_bytes), self._pool)
        self._structures = Structures(parts.renderer.tokenizer, parts.renderer.format, parts.eos)
        self._adapters: Adapters | None = Adapters(parts.model)
        self._adapter_paths: dict[str, str | Path] = {}
        self._bed = threading.RLock()
        self._asleep = 0
        self._offloaded: sleeping.Offloaded | None = None
        self._earlier: dict[str, int] = {}
        self._counting = threading.RLock()
        """Held while what an engine counted becomes what was counted earlier."""
        self._engine = EngineThread(self._make_engine())
        self._preparing = Preparing(self._engine.line, self._pool, settings.prepared_bytes)
        self._keep_room()

    def _keep_room(self) -> None:
        """For what the caches do not hold yet."""
        budget, settings = self._engine.engine.scheduler.budget, self._settings
        assert self._requests.cache is not None and self._features is not None and self._prefix is not None
        budget.bounded(self._requests.cache, settings.pixel_cache_bytes)
        budget.bounded(self._preparing, settings.prepared_bytes)
        budget.bounded(self._features.entries, settings.encoder_cache_bytes)
        budget.bounded(self._prefix, settings.prefix_cache_bytes)

    def _make_engine(self) -> Engine:
        """An engine around the model, with caches that are empty."""
        parts, settings = self.parts, self._settings
        weight = next(parts.model.parameters())
        whole = parts.placement is None and parts.group is None
        budget = settings.cache_bytes
        if whole and weight.device.type == "cuda":
            budget = pool_bytes(weight.device, memory.available(weight.device), budget)
        layout = None if settings.layout == "auto" else settings.layout
        cache = make_cache(parts.cache_spec, weight.dtype, weight.device, layout=layout, kv=settings.kv, budget=budget)
        if parts.placement is not None:
            cache.spread(parts.placement.layers)
        if parts.group is not None:
            cache: Any = lead(parts, cache, settings.kv, layout)
        self._weights: Weights | None = Weights(parts.model)
        self._features: EncoderCache | None = EncoderCache(settings.encoder_cache_bytes, self._weights, weight.dtype)
        features = self._features if settings.encoder_cache_bytes else None
        self._prefix: PrefixCache | None = PrefixCache(cache, settings.prefix_cache_bytes, self._weights)
        # Pages that a sequence takes from kept blocks in the middle of a forward cannot be said to other ranks.
        keeps = settings.prefix_cache_bytes and not (parts.group and hasattr(cache, "reclaim"))
        prefix = self._prefix if keeps else None
        assert self._adapters is not None
        runner = Runner(parts.model, cache, parts.eos, self._adapters)
        if isinstance(cache, Pages):
            cache.pools(0)  # made at once: what is left of the device's memory is what steps may take
        if isinstance(cache, Pages) and whole and weight.device.type == "cuda" and settings.cuda_graphs:
            runner.graphs = Graphs(parts.model, cache, parts.context)
        return Engine(runner, parts.rule.grid, settings, prefix, features)

    def close(self) -> None:
        """End the engine's thread and all requests, which fail with RequestFailed. Nothing can be asked any more."""
        self._preparing.close()
        self._engine.close()
        if self.parts.group is not None:
            self.parts.group.end()

    def __enter__(self) -> VLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if not hasattr(self, "_engine"):  # opening it failed
            return "<VLM, not open>"
        return f"<VLM {self._label}, {'running' if (state := self.state()) == 'ready' else state}>"

    def __reduce__(self) -> NoReturn:
        raise NotAvailable(
            "a VLM cannot be copied, pickled or sent to another process: it holds threads and a model's memory",
            "open it in each process: VLM(...)",
        )

    def forget(self) -> None:
        """Let nothing that was computed so far be used again: weights have changed in a way that torch's counters do not
        show (``parameter.data.add_()``)."""
        if self._weights is not None:
            self._weights.changed()

    def stats(self) -> dict[str, int]:
        """Counts of the engine: requests running and waiting, bytes of keys and values held, and, since it was made, steps,
        tokens computed and generated, patches encoded, preemptions, hits and misses of its caches; and whether it sleeps."""
        pixels, model = self._requests.cache, self.parts.model
        assert pixels is not None
        with self._counting:
            counts = self._engine_counts()
        return counts | {
            "preparing": self._preparing.num_waiting,
            "prepared_bytes": self._preparing.bytes_held,
            "pixel_cache_hits": pixels.hits,
            "pixel_cache_misses": pixels.misses,
            "pixel_cache_bytes": pixels.bytes_held,
            "matrices_kept_exact": 0 if isinstance(model, sleeping.Away) else len(rounding.exact(model)),
            "workers": len(self._pool.pids),
            "workers_lost": self._pool.num_lost,
            "media_retried": self._pool.num_retried,
            "asleep": self._asleep,
        }

    def _engine_counts(self) -> dict[str, int]:
        """Of what goes when it sleeps."""
        features, prefix, now = self._features, self._prefix, self._engine.stats()
        if features is None or prefix is None or not now:
            return {name: 0 if is_moment(name) else value for name, value in self._earlier.items()}
        return add(self._earlier, now | {
            "encoder_cache_hits": features.entries.hits,
            "encoder_cache_misses": features.entries.misses,
            "encoder_cache_bytes": features.entries.bytes_held,
            "prefix_cache_hits": prefix.hits,
            "prefix_cache_misses": prefix.misses,
            "prefix_cache_tokens": prefix.tokens_reused,
            "prefix_cache_evictions": prefix.evictions,
            "prefix_cache_bytes": prefix.bytes_held,
        })  # fmt: skip

    @property
    def precision(self) -> str:
        """How matrices are kept: ``exact`` (bfloat16 as stored, with float32 activations: what a bfloat16 checkpoint gets on a
        CPU unasked), ``int8:128``, ``float32``, ``bfloat16``, ``awq, as stored`` ..."""
        return self.parts.precision

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may ask for."""
        return tuple(self._adapter_paths)

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Make the LoRA adapter in directory ``path`` (as PEFT saves it) answer requests with ``adapter=name``; others do not
        notice. Raises SettingsError for a name that is taken, CheckpointError and its kinds for an adapter that this model
        cannot take whole, OutOfMemory, NotAvailable where several processes share the model."""
        if self.parts.group is not None:
            raise NotAvailable(
                "adapters are not divided among processes", "merge it into the model, or leave tensor_parallel out"
            )
        with self._bed:
            if self._asleep:
                raise sleeping.asleep()
            assert self._adapters is not None
            self._adapters.load(name, path)
            self._adapter_paths[name] = path

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter, asleep or awake. Requests that have it end with it, then its memory is free. SettingsError."""
        with self._bed:
            if self._adapters is not None:
                self._adapters.unload(name)
            else:  # its weights went with the model's, and would come again with them
                check_adapter(name, self._adapter_paths)
            self._adapter_paths.pop(name, None)

    @property
    def recommended_sampling(self) -> Sampling | None:
        """How the release advises to sample (its generation_config.json, else its card); None if it says nothing.

        Nothing uses it unasked: replies are greedy until ``generate(chats, vlm.recommended_sampling)`` says otherwise.
        """
        return self.parts.advised

    def ask(
        self,
        *media_and_question: Any,
        text: str | None = None,
        system: str | None = None,
        thinking: Thinking = "auto",
        guide: Guide | None = None,
        adapter: str | None = None,
        salt: str = "",
        max_image_tokens: int | None = None,
        **options: Any,
    ) -> str:
        """The answer to a question about pictures and videos: ``ask("a.png", "b.mp4", "What happens?")``.

        Media are paths, URLs, bytes, PIL images, arrays ([H, W, 3] a picture, [T, H, W, 3] a video), lists of these, or
        Image and Video with settings of their own; the last input is the question. ``options`` are settings of Sampling
        (``max_tokens=64``) and of Image and Video (``fps=1``, ``max_pixels=...``, or ``max_image_tokens`` of each picture or
        frame instead). ``guide``, ``adapter`` and ``salt`` as in ``submit``. Raises MiradaError.
        """
        options["max_pixels"] = area_of(max_image_tokens, self.parts.rule.grid, options.get("max_pixels"))
        sampling, media = inputs.split_options(options)
        turn = inputs.question(media_and_question, text, media, self.limits)
        chat = [*inputs.system_turn(system), turn]
        output = self.submit(chat, sampling, thinking=thinking, guide=guide, adapter=adapter, salt=salt).result()
        if output.error is not None:
            raise output.error
        return output.message.text

    def stream(
        self,
        chat: ChatLike | Prompt,
        sampling: SamplingLike = None,
        *,
        thinking: Thinking = "auto",
        tools: Tools | None = None,
        media: Seq[Patches] = (),
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        guide: Guide | None = None,
        adapter: str | None = None,
        salt: str = "",
    ) -> Iterator[Delta]:
        """The reply piece by piece, to what ``submit`` takes; raises MiradaError. Leaving the loop early cancels it."""
        handle = self.submit(
            chat, sampling, thinking=thinking, tools=tools, media=media, tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls, guide=guide, adapter=adapter, salt=salt,
        )  # fmt: skip
        try:
            yield from handle
        finally:
            handle.cancel()

    def generate(
        self,
        chats: Iterable[ChatLike | Prompt],
        sampling: SamplingLike | Seq[SamplingLike] = None,
        *,
        thinking: Thinking = "auto",
        tools: Tools | None = None,
        media: Seq[Seq[Patches]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        guide: Seq[Guide | None] | None = None,
        adapter: str | Seq[str | None] | None = None,
        salt: str | Seq[str] = "",
    ) -> list[Output]:
        """One Output per chat, in order; a bad one carries its ``error`` and the others are answered all the same.

        ``sampling``, ``adapter`` and ``salt`` are one for all, or one per chat; ``media`` (of Prompts) and ``guide``, which
        serves one reply alone, are one per chat; the rest is one for all, as in ``submit``. An answer that reaches the end of
        the model's context finishes with ``length``. Raises MessageError for one chat outside a list, and for as many of them
        as there are no chats.
        """
        chats = inputs.chats(chats)
        count = len(chats)
        each = zip(
            chats,
            inputs.each("sampling settings", sampling, count, Sampling, Mapping),
            inputs.each("lists of prepared media", media, count),
            inputs.each("guides", guide, count),
            inputs.each("adapters", adapter, count, str),
            inputs.each("salts", salt, count, str),
            strict=True,
        )
        handles: list[EngineHandle] = []
        # As many as can run, and as many that are prepared meanwhile; never more than may wait, or they would be refused.
        room = threading.Semaphore(min(2 * self._settings.max_running, self._settings.max_waiting))
        try:
            for chat, one, pictures, way, name, scope in each:
                room.acquire()
                handles.append(self.submit(
                    chat, one, thinking=thinking, tools=tools, media=pictures or (), tool_choice=tool_choice,
                    parallel_tool_calls=parallel_tool_calls, guide=way, adapter=name, salt=scope,
                ))  # fmt: skip
                handles[-1].when_done(room.release)
            return [handle.result() for handle in handles]
        finally:
            for handle in handles:
                handle.cancel()

    def submit(
        self,
        chat: ChatLike | Prompt,
        sampling: SamplingLike = None,
        *,
        thinking: Thinking = "auto",
        tools: Tools | None = None,
        media: Seq[Patches] = (),
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        guide: Guide | None = None,
        adapter: str | None = None,
        salt: str = "",
        together: Together | None = None,
    ) -> EngineHandle:
        """Start a request; returns at once, media are prepared meanwhile. Bad input does not raise here: the handle carries
        the error. ``media`` belongs to a Prompt. ``tool_choice``: auto, none, required, or a mapping that names a function;
        without ``parallel_tool_calls`` a reply ends with its first call. ``guide`` says token by token what the reply may hold,
        from its first token on, instead of what settings and tools ask for; it serves this request alone. ``adapter`` names
        one of ``adapters``. What caches hold is shared among requests of one ``salt`` alone. Requests for several replies to
        one chat are given the same ``together``: its media are fetched and prepared once."""
        try:
            if self._asleep:
                raise sleeping.asleep()
            if not isinstance(chat, Prompt) and (not isinstance(media, list | tuple) or media):
                raise MessageError("prepared media are given beside messages", "give them with a Prompt, or put pictures there")
            settings = sampling_of(sampling)
            mode, _ = check_choice(tools, tool_choice)
            shown = tools if mode != "none" else None
            sequence, wanted, finish = self._requests.begin(chat, settings, thinking, media, shown, salt, together)
            sequence.kinds = counted(self.parts.renderer.format, settings, thinking, mode)
            sequence.most_calls = None if parallel_tool_calls else 1
            sequence.guide = guide or self._structures.guide(settings, thinking, tools, tool_choice, parallel_tool_calls)
            if adapter is not None:
                if (adapters := self._adapters) is None:  # it fell asleep meanwhile
                    raise sleeping.asleep()
                found = sequence.lora = adapters.find(adapter)
                sequence.adapter, sequence.media_adapter = found.key, found.media_key
            if together is not None and not isinstance(chat, Prompt):
                if not together.lead():
                    if self._engine.announce(sequence):
                        follower = Follower(sequence, self._engine.line, self._requests.fill, together)
                        self._preparing.watch(sequence, follower.leave)
                        follower.wait()
                    return EngineHandle(sequence, (self._engine, self._preparing))
                # Either would be kept, with its pixels, for as long as somebody holds the reply.
                sequence.listen(partial(_ended, weakref.ref(sequence), weakref.ref(together)))
            if not wanted:
                finish(None)
                self._engine.submit(sequence)
        except MiradaError as error:
            return EngineHandle(Sequence.failed(error))
        if wanted and self._engine.announce(sequence):
            self._preparing.submit(sequence, finish, most_bytes(wanted, self.parts.rule), are_remote(wanted))
        return EngineHandle(sequence, (self._engine, self._preparing))

    def guide(
        self,
        sampling: SamplingLike = None,
        *,
        thinking: Thinking = "auto",
        tools: Tools | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
    ) -> Guide | None:
        """A guide for one reply, as ``submit`` makes it of the same settings: to learn early whether they can be kept to. None
        where the reply may be anything. Raises SettingsError, and NotAvailable without llguidance."""
        return self._structures.guide(sampling_of(sampling), thinking, tools, tool_choice, parallel_tool_calls)


def _ended(leader: weakref.ref[Sequence], together: weakref.ref[Together], done: bool) -> None:
    """If a leader ends before it has made anything, those who wait for it end too."""
    first, shared = leader(), together()
    if done and first is not None and shared is not None:
        shared.settle(first.error or RequestFailed("the request was cancelled while it was prepared", "send it again"))
