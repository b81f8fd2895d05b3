"""What a release advises: its own file first, then its card by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirada.errors import ConfigError
from mirada.models.releases import advised
from mirada.types import Sampling


@pytest.mark.parametrize(
    ("place", "temperature", "max_tokens"),
    [
        ("moonshotai/Kimi-VL-A3B-Instruct", 0.2, 256),
        (Path("/data/kimi-vl-a3b-thinking"), 0.8, 32768),
        ("/cache/models--moonshotai--Kimi-VL-A3B-Thinking-2506/snapshots/0a1b", 0.8, 32768),
    ],
)
def test_cards_go_by_the_name_of_the_release(place, temperature: float, max_tokens: int) -> None:
    assert advised([place], {"eos_token_id": 5}) == Sampling(temperature=temperature, max_tokens=max_tokens)


def test_the_file_of_the_release_comes_first() -> None:
    file = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    made = advised(["Kimi-VL-A3B-Instruct"], file)
    assert made == Sampling(temperature=0.6, top_p=0.95, top_k=20)
    assert advised(["x"], file | {"top_k": 0, "top_p": 1.0}) == Sampling(temperature=0.6)
    assert advised(["x"], file | {"top_k": None, "max_new_tokens": 7}) == Sampling(7, 0.6, top_p=0.95)


@pytest.mark.parametrize("file", [{}, None, {"temperature": None}, {"do_sample": False, "temperature": 0.6}])
def test_silence_is_no_advice(file) -> None:
    assert advised(["models/Kimi-VL-A3B", "Kimi-VL-A3B-Instruct-tuned"], file) is None


@pytest.mark.parametrize("change", [{"temperature": "hot"}, {"temperature": -1}, {"top_p": 0.0}, {"top_k": 1.5}])
def test_a_value_that_makes_no_sense_names_the_file(change: dict) -> None:
    with pytest.raises(ConfigError, match=r"/m/generation_config\.json"):
        advised(["x"], {"temperature": 0.6} | change, "/m/generation_config.json")
