"""Tiny random models of every supported family, and batches for them. No network, no processor: ids and pixels are made here."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.image_processing_utils import select_best_resolution

PAD, IMAGE, VIDEO, VISION_START, VISION_END = 0, 99, 96, 97, 98
VOCAB, DEPTH, HIDDEN = 130, 8, 64


@dataclass(frozen=True)
class Picture:
    """An image in a row: random pixels from ``seed``; ``height`` x ``width`` visual tokens where the family leaves the size free.

    With ``frames`` it is a clip: so many steps of time, ``height`` x ``width`` tokens each."""

    seed: int
    height: int = 4
    width: int = 5
    frames: int = 0


Row = Sequence["int | Picture"]  # text token ids and pictures, in order
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """``make`` builds the model; ``tokens`` says how many visual tokens a picture makes; ``pixels`` its arrays."""

    name: str
    mrope: bool
    make: Callable[[], nn.Module]
    tokens: Callable[[Picture], int]
    pixels: Callable[[Sequence[Picture]], Inputs]

    def expand(self, row: Row) -> list[int]:
        """Token ids of a row, placeholders repeated."""
        ids: list[int] = []
        for item in row:
            if isinstance(item, Picture):
                place = [VIDEO if item.frames else IMAGE] * self.tokens(item)
                ids += [VISION_START, *place, VISION_END] if self.mrope else place
            else:
                ids.append(item)
        return ids

    def inputs(self, rows: Sequence[Row], side: str = "left") -> Inputs:
        """A padded batch: input_ids, attention_mask, pixel values of all pictures in order, and what else the family wants."""
        ids = [self.expand(row) for row in rows]
        width = max(map(len, ids))
        pad = [[PAD] * (width - len(row)) for row in ids]
        table = torch.tensor([p + row if side == "left" else row + p for p, row in zip(pad, ids, strict=True)])
        batch = {"input_ids": table, "attention_mask": (table != PAD).long()}
        pictures = pictures_of(rows)
        if pictures:
            batch |= self.pixels(pictures)
        if self.mrope:
            batch["mm_token_type_ids"] = (table == IMAGE).long() + 2 * (table == VIDEO).long()
        return batch


def pictures_of(rows: Sequence[Row]) -> list[Picture]:
    return [item for row in rows for item in row if isinstance(item, Picture)]


def randomise(model: nn.Module) -> nn.Module:
    """Weights with strong, varied attention, so that removing a token clearly moves the logits. Each tensor's seed is its name."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_((1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.1 * noise)
            elif "embed" in name and "patch" not in name:
                weight.copy_(noise)
            else:
                gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 1.2
                weight.copy_(noise * gain / weight[0].numel() ** 0.5)
    return model


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
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}


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


def square_pixels(side: int, pictures: Sequence[Picture]) -> Inputs:
    return {"pixel_values": torch.stack([noise(p.seed, 3, 14 * side, 14 * side) for p in pictures])}


def patch_pixels(pictures: Sequence[Picture]) -> Inputs:
    """Flattened patches, 2 x 2 of them per visual token; images and clips apart."""
    batch: Inputs = {}
    for pixels, sizes, chosen in (
        ("pixel_values", "image_grid_thw", [p for p in pictures if not p.frames]),
        ("pixel_values_videos", "video_grid_thw", [p for p in pictures if p.frames]),
    ):
        if chosen:
            grid = [(p.frames or 1, 2 * p.height, 2 * p.width) for p in chosen]
            batch[pixels] = torch.cat([noise(p.seed, 4 * (p.frames or 1) * p.height * p.width, 3 * 2 * 4 * 4) for p in chosen])
            batch[sizes] = torch.tensor(grid)
    return batch


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed))


def grid_tokens(picture: Picture) -> int:
    return (picture.frames or 1) * picture.height * picture.width


FAMILIES = {
    family.name: family
    for family in (
        Family("llava", False, lambda: llava(6, 4), lambda p: 36, functools.partial(square_pixels, 6)),
        Family("llava_gqa", False, lambda: llava(4, 2), lambda p: 16, functools.partial(square_pixels, 4)),
        Family("llava_next", False, lambda: llava_next(4), any_res_tokens, any_res_pixels),
        Family("qwen2_vl", True, qwen2_vl, grid_tokens, patch_pixels),
        Family("qwen2_5_vl", True, qwen2_5_vl, grid_tokens, patch_pixels),
    )
}


def build(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh model in eval mode; the same name always has the same weights."""
    torch.manual_seed(0)
    model = randomise(FAMILIES[name].make().eval()).to(dtype)
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [VIDEO, VISION_START, VISION_END, IMAGE]  # random models would write placeholders
    return model


def shared(name: str, attention: str = "sdpa") -> nn.Module:
    """A model that tests may attach to and must give back untouched."""
    return _shared(name, attention)


@functools.lru_cache(maxsize=16)
def _shared(name: str, attention: str) -> nn.Module:
    return build(name, attention)


# one, two (of different sizes where the family allows) and three images, text only; ragged text
ONE: Row = (1, 5, Picture(1, 4, 5), 7, 8, 9, 10)
TWO: Row = (1, Picture(2, 3, 4), 11, Picture(3, 5, 3), 12, 13, 14, 15, 16)
THREE: Row = (1, Picture(4, 4, 6), 21, Picture(5, 2, 5), 22, 23, Picture(6, 4, 4), 24, 25)
TEXT: Row = (1, 31, 32, 33, 34, 35)
MIXED: tuple[Row, ...] = (ONE, THREE, TEXT)

# clips, alone and among images
CLIP: Row = (1, 5, Picture(7, 3, 4, frames=3), 41, 42, 43)
CLIP_AND_IMAGE: Row = (1, Picture(8, 2, 3, frames=2), 44, Picture(9, 3, 4), 45, 46)
IMAGE_AND_CLIPS: Row = (1, Picture(10, 3, 3), 47, Picture(11, 2, 3, frames=4), 48, Picture(12, 3, 2, frames=1), 49)
CLIPS: tuple[Row, ...] = (CLIP, IMAGE_AND_CLIPS, TEXT, CLIP_AND_IMAGE, ONE)


def generate(model: nn.Module, inputs: dict[str, Any], new: int = 4, **options: Any) -> Any:
    """generate() with the logits of every step."""
    defaults = {"do_sample": False, "max_new_tokens": new, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        return model.generate(**inputs, **(defaults | options))


def forward(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **options)
