"""CLIP's text tower beside its vision tower: similarity of an image's tokens to a text."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from duet_vlm.ops.merge import unit_rows


@functools.lru_cache(maxsize=2)
def _loaded(name: str, device: str) -> ClipTextEncoder:
    from transformers import AutoConfig, AutoTokenizer, CLIPModel

    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind != "clip":
            raise ValueError(f"clip={name!r}: a model of type {kind!r}; name a CLIP model with its text tower")
        return ClipTextEncoder(CLIPModel.from_pretrained(name).eval().to(device), AutoTokenizer.from_pretrained(name))
    except OSError as error:
        raise ValueError(
            f"clip={name!r}: no such model here ({' '.join(str(error).split())[:200]}); name a folder or a hub id"
        ) from error


class ClipTextEncoder:
    """The text tower and both projections of a CLIP model, for a vision-language model whose vision tower is the CLIP
    model's own.

    Parameters
    ----------
    clip : CLIPModel
        With ``text_model``, ``text_projection``, ``visual_projection`` and the ``post_layernorm`` of its vision tower.
        It is used unchanged, on its own device and in its own dtype.
    tokenizer : callable
        The CLIP model's tokenizer. A text longer than the tower's window is cut into pieces, without start and end
        marks of their own.

    Raises
    ------
    TypeError
        A model without one of these parts.
    """

    def __init__(self, clip: nn.Module, tokenizer: Any) -> None:
        for name in ("text_model", "text_projection", "vision_model", "visual_projection"):
            if not hasattr(clip, name):
                raise TypeError(f"text_tower: {type(clip).__name__} has no {name}; give a transformers CLIPModel")
        self.clip: Any = clip
        self.tokenizer = tokenizer
        self.window = int(clip.text_model.config.max_position_embeddings)
        self.width = int(clip.visual_projection.in_features)

    @classmethod
    def load(cls, name: str, device: torch.device) -> ClipTextEncoder:
        """The encoder of a CLIP model by folder or hub id, loaded once.

        Raises
        ------
        ValueError
            If there is no such model, or it is no CLIP model.
        """
        return _loaded(name, str(device))

    @torch.no_grad()
    def tokens(self, states: Tensor) -> Tensor:
        """Unit vectors of tokens in the shared space: tower outputs [B, N, C] -> [B, N, E] float32."""
        weight = self.clip.visual_projection.weight
        rows = self.clip.visual_projection(
            self.clip.vision_model.post_layernorm(states.to(weight.device, weight.dtype))
        )
        return unit_rows(rows).to(states.device)

    @torch.no_grad()
    def pieces(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Unit vectors of texts, piece by piece: token ids -> [Q, c, E] float32, and their mask [Q, c]."""
        chunks = [[row[i : i + self.window] for i in range(0, len(row), self.window)] for row in ids]
        flat, counts = (
            [torch.tensor(piece, device="cpu") for row in chunks for piece in row],
            [len(row) for row in chunks],
        )
        weight = self.clip.text_projection.weight
        table = pad_sequence(flat, batch_first=True).to(weight.device)
        mask = pad_sequence([torch.ones_like(piece) for piece in flat], batch_first=True).to(weight.device)
        pooled = self.clip.text_model(input_ids=table, attention_mask=mask).pooler_output
        rows = pad_sequence(list(unit_rows(self.clip.text_projection(pooled)).split(counts)), batch_first=True)
        return rows, torch.arange(rows.shape[1], device=rows.device) < torch.tensor(counts, device=rows.device)[:, None]

    def texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """``pieces`` of texts."""
        rows: tuple[Tensor, Tensor] = self.pieces([list(self.tokenizer(text)["input_ids"]) for text in texts])
        return rows
