"""Prompts for any supported model without a processor: pictures of noise, placeholders, random words. What is read does not change how long it
takes."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duet_vlm.models.adapter import Adapter, Stream

BOS = 1


@dataclass(frozen=True)
class Prompt:
    """``text``: what the model is called with besides the picture; ``picture``: the encoder's arguments; ``tokens`` visual tokens per row, which
    the tower looks at in ``parts``."""

    stream: str
    encode: str
    text: dict[str, Tensor]
    picture: dict[str, Any]
    tokens: int
    parts: int = 1

    @property
    def rows(self) -> int:
        return self.text["input_ids"].shape[1]

    @property
    def batch(self) -> int:
        return self.text["input_ids"].shape[0]

    @property
    def sizes(self) -> dict[str, Any]:
        """Arguments of the picture that the model reads beside its features (grids)."""
        return {name: value for name, value in self.picture.items() if not name.startswith("pixel_")}


def prompt_for(adapter: Adapter, batch: int, text: int, tokens: int | None = None, frames: int = 0, picture: Any = None) -> Prompt:
    """One picture and ``text`` words per row.

    Parameters
    ----------
    tokens : int, optional
        Visual tokens per picture, where the family leaves its size free: the nearest square is taken (per step of time, with ``frames``).
    frames : int
        Steps of time of a clip; 0 for an image.
    picture : dict, optional
        The encoder's arguments for one picture, instead of a square of noise.

    Raises
    ------
    ValueError
        If the family has no such input.
    """
    name = "video" if frames else "image"
    stream = next((s for s in adapter.streams if s.name == name), None)
    if stream is None:
        raise ValueError(f"{adapter.family} models take no {name}s")
    picture = _noise(adapter, stream, tokens, frames) if picture is None else picture
    weight = next(adapter.model.parameters())
    one = {key: _placed(value, weight) for key, value in picture.items()}
    with torch.inference_mode():
        found = getattr(adapter.base, stream.encode)(**one).pooler_output
    counts = [len(rows) for rows in found]
    parts = sum(len(span) for span in adapter.passes(stream.encoding(one), counts))
    many = {key: torch.cat([value] * batch) if isinstance(value, Tensor) else value for key, value in one.items()}
    return Prompt(name, stream.encode, _words(adapter, stream, sum(counts), text, batch), many, sum(counts), parts)


def _noise(adapter: Adapter, stream: Stream, tokens: int | None, frames: int) -> dict[str, Any]:
    """Free sizes come as grids of patches (time, height, width); all others as the family's own blank image, filled with noise."""
    if stream.sizes is None or not stream.sizes.endswith("grid_thw"):
        blank = adapter.blank_image()
        return {key: torch.randn(value.shape) if key.startswith("pixel_") else value for key, value in blank.items()}
    shape = adapter.vision_shape()
    merge = math.isqrt(shape.patches_per_token)
    side = max(2, math.isqrt((tokens or 256) // max(1, frames)))
    grid = torch.tensor([[frames or 1, merge * side, merge * side]])
    return {stream.pixels: torch.randn(int(grid.prod()), shape.patch_inputs), stream.sizes: grid}


def _placed(value: Any, weight: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(weight.device, weight.dtype) if value.is_floating_point() else value.to(weight.device)


def _words(adapter: Adapter, stream: Stream, visual: int, text: int, batch: int) -> dict[str, Tensor]:
    """A start token, the placeholders, random words that are nothing special; the same in every row."""
    config, device = adapter.model.config, next(adapter.model.parameters()).device
    named = [(k, v) for part in (config, config.get_text_config()) for k, v in vars(part).items()]
    special = {value for key, value in named if key.endswith(("_token_id", "_token_index")) and isinstance(value, int)}
    special |= {other.token_id for other in adapter.streams}
    vocabulary = [i for i in range(2, min(config.get_text_config().vocab_size, 2000)) if i not in special]
    words = torch.tensor(vocabulary)[torch.randint(len(vocabulary), (text,), generator=torch.Generator().manual_seed(2))]
    row = torch.cat([torch.tensor([BOS]), torch.full((visual,), stream.token_id), words])
    ids = row.expand(batch, -1).contiguous().to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inspect.signature(adapter.model.forward).parameters:
        kind = 2 if stream.name == "video" else 1
        inputs["mm_token_type_ids"] = kind * (ids == stream.token_id).long()
    return inputs
