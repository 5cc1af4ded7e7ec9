"""LLaVA-1.5 and LLaVA-NeXT. Their signals are tested in test_signals.py; a new family writes them, see internvl.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)
from transformers.image_processing_utils import select_best_resolution

from families.base import DEPTH, HIDDEN, IMAGE, PAD, VOCAB, Family, Inputs, Picture, noise


def llava(side: int, kv_heads: int) -> nn.Module:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, projection_dim=32,
            image_size=14 * side, patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=DEPTH, num_attention_heads=4, num_key_value_heads=kv_heads,
            vocab_size=VOCAB, max_position_embeddings=512, pad_token_id=PAD, bos_token_id=1, eos_token_id=None,
        ),
        image_token_id=IMAGE, image_token_index=IMAGE, image_seq_length=side**2,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


PINPOINTS = [(56, 112), (112, 56), (112, 112)]


def llava_next(side: int) -> nn.Module:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, projection_dim=32, image_size=14 * side,
            patch_size=14,
        ),
        text_config=MistralConfig(
            hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=DEPTH, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            vocab_size=VOCAB, max_position_embeddings=1024, sliding_window=None, pad_token_id=PAD, bos_token_id=1, eos_token_id=None,
        ),
        image_token_id=IMAGE, image_token_index=IMAGE, image_grid_pinpoints=[list(size) for size in PINPOINTS],
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config)


def any_res_size(picture: Picture) -> tuple[int, int]:
    """Height and width in pixels; most do not fit the grid, so rows are cut off."""
    return 11 * picture.height, 11 * picture.width


def any_res_crops(picture: Picture) -> tuple[int, int]:
    """Rows and columns of crops, the overview left out."""
    height, width = select_best_resolution(any_res_size(picture), PINPOINTS)
    return height // 56, width // 56


def any_res_layout(picture: Picture) -> list[tuple[int, int] | None]:
    """Per visual token its crop (0 is the overview) and its patch there, None for a newline: laid out by hand."""
    height, width = any_res_size(picture)
    rows, columns = (4 * n for n in any_res_crops(picture))
    top = left = 0
    if width / height > columns / rows:  # padded above and below
        top = (rows - int(round(height * columns / width, 7))) // 2
    else:
        left = (columns - int(round(width * rows / height, 7))) // 2
    layout: list[tuple[int, int] | None] = [(0, patch) for patch in range(16)]
    for y in range(top, rows - top):
        layout += [(1 + y // 4 * (columns // 4) + x // 4, y % 4 * 4 + x % 4) for x in range(left, columns - left)]
        layout.append(None)
    return layout


def any_res_tokens(picture: Picture) -> int:
    return len(any_res_layout(picture))


def any_res_pixels(pictures: Sequence[Picture]) -> Inputs:
    sizes = [any_res_size(p) for p in pictures]
    crops = [1 + math.prod(any_res_crops(p)) for p in pictures]
    pixels = torch.zeros(len(pictures), max(crops), 3, 56, 56)
    for row, picture, count in zip(pixels, pictures, crops, strict=True):
        row[:count] = noise(picture.seed, count, 3, 56, 56)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


class Llava(Family):
    def __init__(self, name: str, side: int, kv_heads: int) -> None:
        self.name, self.side, self.kv_heads = name, side, kv_heads

    def make(self) -> nn.Module:
        return llava(self.side, self.kv_heads)

    def tokens(self, picture: Picture) -> int:
        return self.side**2

    def pixels(self, pictures: Sequence[Picture]) -> Inputs:
        return {"pixel_values": torch.stack([noise(p.seed, 3, 14 * self.side, 14 * self.side) for p in pictures])}

    def features(self, model: nn.Module, inputs: Inputs) -> dict[str, list[Tensor]]:
        states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        return {"image": list(states[model.config.vision_feature_layer])}

    def pointwise(self, model: nn.Module) -> nn.Module:
        return model.model.multi_modal_projector

    def skip(self) -> int:
        return 1


class LlavaNext(Family):
    name = "llava_next"
    offloaded = "call"  # its newline row is read where images are encoded, outside of the forward

    def make(self) -> nn.Module:
        return llava_next(4)

    def tokens(self, picture: Picture) -> int:
        return any_res_tokens(picture)

    def pixels(self, pictures: Sequence[Picture]) -> Inputs:
        return any_res_pixels(pictures)


FAMILIES = [Llava("llava", 6, 4), Llava("llava_gqa", 4, 2), LlavaNext()]
