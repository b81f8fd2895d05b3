"""Two processes on loopback that share a model: what each of them runs. Spawned, so it imports no test."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

LIMIT = timedelta(seconds=120)
"""After which a rank that waits for another gives up."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def entry(rank: int, ranks: int, port: int, out: str, what: str, *args: Any) -> None:
    """Run ``what`` of this module as one rank; its answer, or what went wrong, goes into ``out``."""
    import torch
    import torch.distributed as dist

    sys.path.insert(0, str(Path(__file__).parents[1]))
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks, timeout=LIMIT)
    try:
        made = {"made": globals()[what](rank, ranks, *args)}
    except Exception as error:
        made = {"error": type(error).__name__, "said": str(error), "traceback": traceback.format_exc()}
    Path(out, f"{rank}.json").write_text(json.dumps(made))
    if "error" not in made:
        dist.barrier()
        dist.destroy_process_group()


def run(out: Path, what: str, *args: Any, ranks: int = 2, seconds: float = 120) -> list[dict[str, Any]]:
    """What each rank made of ``what``; processes that are not over in time are ended, and the test fails."""
    import torch.multiprocessing as mp

    out.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("spawn")
    port = free_port()
    processes = [context.Process(target=entry, args=(rank, ranks, port, str(out), what, *args)) for rank in range(ranks)]
    for process in processes:
        process.start()
    ends = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, ends - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} of {ranks} processes did not end"
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


def asked(vlm: Any) -> list[Any]:
    """Random mixes, and text long enough for whole blocks to be kept."""
    from engine.mixes import mix

    from mirada.types import Prompt

    return [*mix(vlm, 17, 5), (Prompt(tuple(range(5, 95))), [])]


def answers(vlm: Any, asked: list[Any], tokens: int) -> list[dict[str, Any]]:
    """Ids, and the smallest gap between the two best logits on the way: ids may part where it is tiny."""
    from engine.mixes import gap, recorded

    from mirada.types import Sampling

    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    with recorded(vlm) as seen:
        handles = [vlm.submit(prompt, sampling, media=media) for prompt, media in asked]
        outputs = [handle.result(100) for handle in handles]
    for output in outputs:
        if output.error is not None:
            raise output.error
    return [
        {"ids": list(output.tokens), "gap": min(map(gap, seen[prompt.tokens])), "first": seen[prompt.tokens][0].tolist()}
        for output, (prompt, _) in zip(outputs, asked, strict=True)
    ]


Work = Callable[..., Any]


def generate_all(rank: int, ranks: int, cases: dict[str, tuple[str, str]]) -> Any:
    """Case -> what ``generate`` makes of (directory, kind of cache), one model after another in the same processes."""
    return {name: generate(rank, ranks, *case) for name, case in cases.items()} | {
        "refused": refuse(rank, ranks, *cases["qwen2_vl"])
    }


def generate(rank: int, ranks: int, directory: str, kv: str) -> Any:
    """The engine on the first rank, twice over the same requests (the second time from what was kept)."""
    from mirada import VLM
    from mirada.errors import NotAvailable

    if rank:
        VLM.follow(directory, ranks, device="cpu")
        return None
    with VLM(directory, device="cpu", tensor_parallel=ranks, engine={"kv": kv, "step_tokens": 24}) as vlm:
        prompts = asked(vlm)
        made = answers(vlm, prompts, 6)
        again = answers(vlm, prompts, 6)
        held = sum(p.nbytes for p in vlm.parts.model.decoder.layers.parameters())
        try:
            vlm.load_adapter("a", directory)
            adapter = "taken"
        except NotAvailable as error:
            adapter = str(error)
        hits = vlm.stats()["prefix_cache_hits"]
        return {"made": made, "again": again, "layers": held, "hits": hits, "adapter": adapter}


def refuse(rank: int, ranks: int, directory: str, _: str) -> Any:
    """Whatever each rank is told when it is asked for what cannot be."""
    from mirada import VLM
    from mirada.errors import MiradaError

    said = []
    calls = [
        lambda: VLM(directory, device="cpu", tensor_parallel=3),
        lambda: VLM(directory, device="cpu", tensor_parallel=ranks, quant="int8"),
        lambda: VLM(directory, tensor_parallel=ranks, device_map="auto"),
        lambda: VLM("mini", device="cpu", tensor_parallel=ranks),
    ]
    calls.append(
        (lambda: VLM(directory, device="cpu", tensor_parallel=ranks)) if rank else (lambda: VLM.follow(directory, ranks))
    )
    for call in calls:
        try:
            call()
            said.append("nothing")
        except MiradaError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def leave(rank: int, ranks: int, directory: str) -> Any:
    """The first rank goes without a word."""
    from mirada import VLM

    if rank:
        VLM.follow(directory, ranks, device="cpu")
        return None
    vlm = VLM(directory, device="cpu", tensor_parallel=ranks)
    answers(vlm, asked(vlm)[:1], 2)
    Path(directory, "left").write_text("yes")
    os._exit(0)


def break_off(rank: int, ranks: int, directory: str) -> Any:
    """A follower fails in the middle: requests fail with a typed error, and so do all that come after."""
    from mirada import VLM

    if rank:
        import torch

        from mirada.models.decoder import DecoderLayer

        forward, calls = DecoderLayer.forward, []

        def failing(self: Any, *args: Any) -> torch.Tensor:
            calls.append(1)
            if len(calls) == 7:
                os._exit(1)
            return forward(self, *args)

        DecoderLayer.forward = failing
        VLM.follow(directory, ranks, device="cpu")
        return None
    vlm = VLM(directory, device="cpu", tensor_parallel=ranks)
    made = []
    for _ in range(2):
        try:
            answers(vlm, asked(vlm)[:1], 30)
            made.append("an answer")
        except Exception as error:
            made.append(f"{type(error).__name__}: {error}")
    Path(directory, "broken.json").write_text(json.dumps(made))
    os._exit(0)
