"""Mirada's side of a comparison, in a process of its own: ``harness.Worker`` starts it, ``worker.py`` says how it is asked."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from worker import Stage, serve

from mirada import VLM, Image, Message, Output, Sampling, Text
from mirada.types import Prompt

LATER = 0.1
"""Seconds after others came at which a question is asked."""
MODES: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "exact": {"quant": "exact"},
    "int8": {"quant": "int8"},
    "int4": {"quant": "int4"},
}
"""What ``VLM`` is given for each precision."""


class Side:
    """One model; every method is an order."""

    vlm: VLM

    def load(self, model: str, mode: str = "fp32", engine: dict[str, Any] | None = None, **settings: Any) -> dict[str, float]:
        """Seconds that it takes; greedy answers of one token, so that the first measured run is not the first of all."""
        began = time.perf_counter()
        given: dict[str, Any] = MODES[mode] | settings
        if engine:
            given["engine"] = engine
        self.vlm = VLM(model, **given)
        return {"seconds": time.perf_counter() - began, "resident": resident()}

    def run(self, ids: list[int], new: int, logprobs: int | None = None) -> dict[str, Any]:
        """Prefill and decode of one prompt; seconds by the clock and of processor, of decode for each token."""
        stage = Stage()
        handle = self.vlm.submit(Prompt(tuple(ids)), sampling(new, logprobs))
        next(iter(handle))
        stage.mark("prefill")
        output = checked(handle.result(), new)
        stage.mark("decode", max(1, new - 1))
        chosen = [one.logprob for one in output.logprobs] if output.logprobs else []
        return stage.spent | {"tokens": list(output.tokens), "logprobs": chosen}

    def logits(self, prompts: list[list[int]], file: str) -> None:
        """Logits of every position, float32 [prompts, tokens, vocabulary], into ``file`` (npy)."""
        from mirada.layers.batch import Batch

        model: Any = self.vlm.parts.model
        made = []
        with torch.inference_mode():
            for ids in prompts:
                places = torch.arange(len(ids)).expand(3, -1)
                hidden = model.forward(Batch(torch.tensor(ids), places, (len(ids),)), None, None)
                made.append(model.logits(hidden).float().numpy())
        np.save(file, np.stack(made))

    def ask(self, size: int, seed: int, question: str) -> dict[str, Any]:
        """The first token of an answer about one picture of noise."""
        chat = [Message("user", (Image(picture(size, seed)), Text(question)))]
        stage = Stage()
        (output,) = self.vlm.generate([chat], sampling(1))
        stage.mark("first")
        return stage.spent | {"prompt": checked(output, 1).usage.prompt_tokens}

    def ask_all(self, size: int, seed: int, questions: list[str], new: int) -> dict[str, Any]:
        """Questions one after the other about the same picture."""
        shown = picture(size, seed)
        stage, counts = Stage(), []
        for question in questions:
            (output,) = self.vlm.generate([[Message("user", (Image(shown), Text(question)))]], sampling(new))
            counts.append(checked(output, new).usage.prompt_tokens)
        stage.mark("all")
        return stage.spent | {"prompt": sum(counts)}

    def batch(self, requests: list[dict[str, Any]], new: int, together: bool = True) -> dict[str, Any]:
        """Requests handed over at once, or one by one."""
        chats = [chat(request) for request in requests]
        stage = Stage()
        if together:
            outputs = self.vlm.generate(chats, sampling(new))
        else:
            outputs = [self.vlm.generate([one], sampling(new))[0] for one in chats]
        stage.mark("all")
        counts = [checked(output, new).usage.prompt_tokens for output in outputs]
        return stage.spent | {"prompt": sum(counts), "tokens": new * len(outputs)}

    def beside(self, load: list[dict[str, Any]], question: str, new: int, steps: int) -> dict[str, Any]:
        """Gaps between the tokens of one request while ``load`` comes and is answered (nothing: ``steps`` tokens long), and the
        first token of a question that comes after it; all by the clock and of processor."""
        reader = Reader(self.vlm.submit([Message("user", "Tell me a long story.")], sampling(new)))
        reader.wait(4)
        began, stage = now(), Stage()
        handles = [self.vlm.submit(asked(request), sampling(1)) for request in load]
        time.sleep(LATER)
        asking = Stage()
        first = self.vlm.submit([Message("user", question)], sampling(1))
        next(iter(first))
        asking.mark("first")
        for handle in handles:
            checked(handle.result(), 1)
        if not load:
            reader.wait(4 + steps)
        stage.mark("all")
        gaps = reader.close(began)
        return asking.spent | stage.spent | {"gaps": gaps}

    def score(self, samples: int) -> dict[str, float]:
        """Held-out figures of the recipe's tasks, by the name of the task."""
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
        import mini_eval  # pyright: ignore[reportMissingImports]

        return {task.name: mini_eval.evaluate(self.vlm, task, samples, 50, None)["value"] for task in mini_eval.TASKS}

    @staticmethod
    def bandwidth(side: int = 1 << 13) -> float:
        """Bytes per second that all threads read from memory: the best of two ways and seven tries, of ``side`` squared floats
        (256 MB, which fit no cache)."""
        big, one = torch.ones(side, side), torch.ones(side)
        return big.numel() * 4 / min(min(seconds(big.sum), seconds(lambda: big @ one)) for _ in range(7))


class Reader:
    """Reads a reply in a thread of its own, and notes when each token came."""

    def __init__(self, handle: Any) -> None:
        self._handle, self._came = handle, [now()]
        self._news = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for delta in self._handle:
            with self._news:
                self._came += [now()] * bool(delta.tokens)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait(self, count: int) -> None:
        """Until ``count`` tokens more have come; RuntimeError if it ends before."""
        with self._news:
            least = len(self._came) + count
            self._news.wait_for(lambda: len(self._came) >= least or self._ended)
            if self._ended:
                raise RuntimeError("the reply ended before all was measured; make it longer")

    def close(self, since: tuple[float, float]) -> list[tuple[float, float]]:
        """End the reply with its next token; the gaps since then, the one under way at that time included."""
        self.wait(1)
        self._handle.cancel()
        self._thread.join()
        return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(self._came, self._came[1:], strict=False) if b[0] > since[0]]


def now() -> tuple[float, float]:
    """Seconds by the clock, and of processor time of the whole process."""
    return time.perf_counter(), time.process_time()


def asked(request: dict[str, Any]) -> Any:
    """What a request asks: ids as they are, or a chat."""
    return Prompt(tuple(request["ids"])) if "ids" in request else chat(request)


def seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def sampling(new: int, logprobs: int | None = None) -> Sampling:
    """Greedy, exactly ``new`` tokens: no end, and no guard against the loops that random weights run into."""
    return Sampling(max_tokens=new, ignore_eos=True, max_repeats=None, logprobs=logprobs)


def checked(output: Output, new: int) -> Output:
    if output.error is not None:
        raise output.error
    if output.usage.completion_tokens != new:
        raise RuntimeError(f"{output.usage.completion_tokens} tokens instead of {new} ({output.finish})")
    return output


def picture(size: int, seed: int) -> np.ndarray:
    """uint8 [size, size, 3]; ``peers.py`` makes the same."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def chat(request: dict[str, Any]) -> list[Message]:
    """A request is {"text": ..., "size": pixels or 0, "seed": of the picture}."""
    shown = (Image(picture(request["size"], request["seed"])),) if request["size"] else ()
    return [Message("user", (*shown, Text(request["text"])))]


def resident() -> float:
    """Bytes of memory that this process holds now."""
    path = Path("/proc/self/statm")
    return float(path.read_text().split()[1]) * 4096 if path.exists() else 0.0


if __name__ == "__main__":
    side = Side()
    names = ("load", "run", "logits", "ask", "ask_all", "batch", "beside", "score", "bandwidth")
    serve({name: getattr(side, name) for name in names})
