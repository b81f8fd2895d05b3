"""What every vision-language model here is made of: tower, projector, decoder, head.

N patches, F features, T tokens, D width of the decoder, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mirada.errors import MessageError
from mirada.layers.batch import Batch, MediaBatch
from mirada.layers.linear import Linear
from mirada.models.slices import Room, Slices, unbound, whole
from mirada.models.vit import grid_segments
from mirada.types import Grid

_OUTPUTS = ("attention.out.weight", "mlp.fc2.weight", "mlp.down.weight", "mlp.shared.down.weight", "mlp.experts.down")
"""Parameters whose products go into a residual."""


class VisionLanguageModel(nn.Module):
    """``encode`` media, ``forward`` packed tokens, ``logits`` of the rows that are wanted.

    ``config`` has ``text`` (vocab_size, hidden_size, tie_word_embeddings). ``visual`` (a ``SlicedTower``) gives features
    of patches, ``projector(features, grids)`` those of tokens; ``decoder`` has ``embed``, ``layers`` and
    ``forward(x, batch, cache)``.
    """

    def __init__(
        self, config: Any, visual: nn.Module, projector: nn.Module, decoder: nn.Module, frames_apart: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        self.config_text: str | None = None
        """config.json as it was read; what a save writes."""
        self.frames_apart = frames_apart
        """Whether each frame of a video sees only itself, or the whole video sees itself."""
        self.visual: Any = visual
        self.projector: Any = projector
        self.decoder: Any = decoder
        self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes head and embedding one parameter, where the config says so."""
        if self.config.text.tie_word_embeddings and isinstance(self.lm_head, nn.Linear):  # else: another form of it
            self.lm_head.weight = self.decoder.embed.weight

    def segments(self, grids: Sequence[Grid]) -> tuple[int, ...]:
        """Lengths of the runs of patches that see each other."""
        return grid_segments(grids, self.frames_apart)

    def encode(self, media: MediaBatch) -> Tensor:
        """Normalised patches -> [F, D] features in the order of the placeholders."""
        return whole(self.encoding(media))

    def encoding(self, media: MediaBatch, room: Room = unbound) -> Slices[Tensor]:
        """``encode`` in slices: patches, each layer of the tower, projector, each of them in several where ``room`` says so."""
        grids = media.grids
        tower = self.visual.slices(media.pixels, grids, self.segments(grids), room)
        del media  # pixels are let go once they are embedded
        return (yield from self.projector.slices((yield from tower), grids, room))

    def embed(self, batch: Batch, features: Tensor | None = None) -> Tensor:
        """[T, D]: token embeddings, with features written over their placeholders."""
        # The table may be kept as it is stored where the rest computes in float32.
        x = self.decoder.embed(batch.tokens).to(self.decoder.norm.weight.dtype)
        rows = 0 if batch.feature_rows is None else len(batch.feature_rows)
        given = 0 if features is None else len(features)
        if rows != given:
            raise MessageError(
                f"{given} visual features for {rows} placeholder tokens",
                "encode exactly the media of this batch, in the order of their spans",
            )
        if features is None or batch.feature_rows is None or not rows:
            return x
        return x.index_copy(0, batch.feature_rows, features.to(x.dtype))

    def forward(self, batch: Batch, features: Tensor | None = None, cache: Any = None) -> Tensor:
        """Hidden values [T, D] after the final norm. With a cache, only the new tokens are in ``batch``."""
        return self.decoder(self.embed(batch, features), batch, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., D] -> float32 [.., V]."""
        return self.lm_head(hidden).float()

    def next_logits(self, batch: Batch, features: Tensor | None = None, cache: Any = None) -> Tensor:
        """float32 [T, V]: ``logits`` of ``forward``, for every token of ``batch``; a decoder may compute both at once."""
        at_once = getattr(self.decoder, "logits", None)
        if at_once is None:
            return self.logits(self.forward(batch, features, cache))
        plain = features is None and batch.feature_rows is None
        made = at_once(None, batch, cache, self.lm_head) if plain else None
        if made is not None:
            return made
        x = self.embed(batch, features)
        made = at_once(x, batch, cache, self.lm_head)
        return self.logits(self.decoder(x, batch, cache)) if made is None else made

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Fresh weights for training: tables normal with deviation 0.02, matrices 1/sqrt(inputs), residual outputs less
        by depth; norms one, biases zero. Small widths learn markedly faster from these than from 0.02 throughout."""
        random = torch.Generator(self.lm_head.weight.device).manual_seed(seed)
        depths = {name: len(part.layers) for name, part in (("visual", self.visual), ("decoder", self.decoder))}
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            std = 0.02 if "embed" in name or "positions" in name or "lm_head" in name else parameter.shape[-1] ** -0.5
            if name.endswith(_OUTPUTS) and "projector" not in name:
                std *= (2 * depths[name.partition(".")[0]]) ** -0.5
            parameter.normal_(std=std, generator=random)
