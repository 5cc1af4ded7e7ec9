"""Random-weight models built from configs in code, at shapes large enough to mean something on two cores, and prompts
for them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

PATCH = 14


@dataclass(frozen=True)
class Shape:
    """A model: decoder ``layers`` x ``hidden``, tower ``vision_layers`` x ``vision_hidden``, ``side`` x ``side`` visual
    tokens per image.

    ``text`` rows follow the image in the prompt. ``family`` "llava" has a tower with CLS, "qwen2_5_vl" one without (2 x
    2 patches per token).
    """

    family: str = "llava"
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    kv_heads: int = 12
    mlp: int = 3072
    vision_layers: int = 12
    vision_hidden: int = 768
    vision_mlp: int = 3072
    side: int = 24
    text: int = 64
    vocab: int = 32000

    @property
    def visual_tokens(self) -> int:
        return self.side**2


LLAVA = Shape()
LLAVA_NARROW = replace(LLAVA, mlp=2048)
WIDE = Shape(layers=4, hidden=4096, heads=32, kv_heads=32, mlp=11008, vision_layers=2)  # four layers of a 7B decoder
QWEN = Shape(family="qwen2_5_vl", kv_heads=2, vision_mlp=2048)
TINY = Shape(
    layers=4,
    hidden=64,
    heads=4,
    kv_heads=4,
    mlp=96,
    vision_layers=2,
    vision_hidden=32,
    vision_mlp=48,
    side=6,
    text=8,
    vocab=128,
)
TINY_QWEN = replace(TINY, family="qwen2_5_vl", kv_heads=2)


def build(shape: Shape) -> nn.Module:
    """The model in eval mode, float32, sdpa; the same shape always has the same weights."""
    torch.manual_seed(0)
    model = _llava(shape) if shape.family == "llava" else _qwen(shape)
    return model.eval()


def twin(model: nn.Module) -> nn.Module:
    """A second instance over the same parameter tensors: one to attach to, one to leave alone."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def text_config(shape: Shape) -> dict[str, Any]:
    return {
        "num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.mlp, "vocab_size": shape.vocab, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": None,
    }  # fmt: skip


def special(shape: Shape) -> int:
    """The image placeholder; the ids just below it are the family's other special tokens."""
    return shape.vocab - 1


def _llava(shape: Shape) -> nn.Module:
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_hidden, intermediate_size=shape.vision_mlp, num_hidden_layers=shape.vision_layers,
        num_attention_heads=max(1, shape.vision_hidden // 64), image_size=PATCH * shape.side, patch_size=PATCH, projection_dim=shape.vision_hidden,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**text_config(shape)), image_token_id=special(shape), image_token_index=special(shape),
        image_seq_length=shape.visual_tokens,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def _qwen(shape: Shape) -> nn.Module:
    width = shape.hidden // shape.heads // 2  # rotary pairs per head, shared by time, height and width
    section = [width - 2 * (3 * width // 8), 3 * width // 8, 3 * width // 8]
    last = shape.vision_layers - 1
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": shape.vision_layers, "hidden_size": shape.vision_hidden, "intermediate_size": shape.vision_mlp, "out_hidden_size": shape.hidden,
            "num_heads": max(1, shape.vision_hidden // 64), "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
            "window_size": 8 * PATCH, "fullatt_block_indexes": sorted({last // 2, last}),
        },
        text_config=text_config(shape) | {"rope_parameters": {"rope_type": "default", "mrope_section": section, "rope_theta": 1e6}},
        image_token_id=special(shape), video_token_id=special(shape) - 1, vision_start_token_id=special(shape) - 2,
        vision_end_token_id=special(shape) - 3,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def picture(shape: Shape) -> dict[str, Tensor]:
    """The encoder's inputs for one image of noise."""
    torch.manual_seed(1)
    if shape.family == "llava":
        return {"pixel_values": torch.randn(1, 3, PATCH * shape.side, PATCH * shape.side)}
    patches = 4 * shape.visual_tokens
    return {
        "pixel_values": torch.randn(patches, 3 * 2 * PATCH * PATCH),
        "image_grid_thw": torch.tensor([[1, 2 * shape.side, 2 * shape.side]]),
    }


def prompt(shape: Shape) -> dict[str, Tensor]:
    """One row: a start token, the image's placeholders, ``text`` tokens."""
    torch.manual_seed(2)
    start = torch.tensor([1, special(shape) - 2] if shape.family != "llava" else [1])
    text = torch.randint(2, special(shape) - 3, (shape.text,))
    ids = torch.cat([start, torch.full((shape.visual_tokens,), special(shape)), text])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if shape.family != "llava":
        inputs["mm_token_type_ids"] = (ids == special(shape)).long()
    return inputs
