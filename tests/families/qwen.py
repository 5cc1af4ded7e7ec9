"""Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from families.base import (
    DEPTH,
    HIDDEN,
    IMAGE,
    PAD,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    Family,
    Inputs,
    Picture,
    noise,
)

QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def qwen_text() -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": VOCAB, "max_position_embeddings": 512, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }  # fmt: skip


def qwen2_vl() -> nn.Module:
    vision = {
        "depth": 3, "embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "in_channels": 3,
    }  # fmt: skip
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=vision, text_config=qwen_text(), **QWEN_IDS))


def qwen2_5_vl() -> nn.Module:
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": HIDDEN, "num_heads": 4, "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2, "in_channels": 3, "window_size": 16, "fullatt_block_indexes": [1, 3],
        },
        text_config=qwen_text(), **QWEN_IDS,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def patch_pixels(pictures: Sequence[Picture]) -> Inputs:
    """Flattened patches, 2 x 2 of them per visual token; images and clips apart."""
    batch: Inputs = {}
    for pixels, sizes, chosen in (
        ("pixel_values", "image_grid_thw", [p for p in pictures if not p.frames]),
        ("pixel_values_videos", "video_grid_thw", [p for p in pictures if p.frames]),
    ):
        if chosen:
            grid = [(p.frames or 1, 2 * p.height, 2 * p.width) for p in chosen]
            batch[pixels] = torch.cat(
                [noise(p.seed, 4 * (p.frames or 1) * p.height * p.width, 3 * 2 * 4 * 4) for p in chosen]
            )
            batch[sizes] = torch.tensor(grid)
    return batch


class Qwen(Family):
    """Grids of any size, clips, M-RoPE."""

    mrope = True
    video = True

    def tokens(self, picture: Picture) -> int:
        return (picture.frames or 1) * picture.height * picture.width

    def pixels(self, pictures: Sequence[Picture]) -> Inputs:
        return patch_pixels(pictures)

    def places(self, picture: Picture) -> list[int]:
        return [VISION_START, *super().places(picture), VISION_END]

    def extras(self, table: Tensor) -> Inputs:
        return {"mm_token_type_ids": (table == IMAGE).long() + 2 * (table == VIDEO).long()}

    def positions(self, model: nn.Module, prompt: Tensor, grids: dict[str, Tensor], total: int) -> Tensor:
        """The M-RoPE positions of the prompt continued by one per token."""
        positions = torch.arange(len(prompt)).expand(3, 1, -1)
        if grids:
            kinds = self.extras(prompt[None])["mm_token_type_ids"]
            positions, _ = model.model.get_rope_index(prompt[None], kinds, **grids)
        # as generate goes on, also where time runs past the text
        later = torch.arange(total - len(prompt)) + positions[..., -1:] + 1
        return torch.cat([positions, later], -1)


class Qwen2VL(Qwen):
    name = "qwen2_vl"

    def make(self) -> nn.Module:
        return qwen2_vl()


class Qwen25VL(Qwen):
    name = "qwen2_5_vl"

    def make(self) -> nn.Module:
        return qwen2_5_vl()


FAMILIES: list[Family] = [Qwen2VL(), Qwen25VL()]
