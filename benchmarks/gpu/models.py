"""The models of the GPU benchmarks at their real shapes, and the same families at a shape that a CPU runs in seconds.
Random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
)

VICUNA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32064,
}  # fmt: skip
MISTRAL_7B = VICUNA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8}
QWEN_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 152064,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
CLIP_TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
LONG = {"max_position_embeddings": 32768}


def llava(tiny: bool) -> PreTrainedConfig:
    """LLaVA-1.5-7B: 576 tokens of one 336-pixel image."""
    text, vision, last = (TINY, CLIP_TINY, 199) if tiny else (VICUNA_7B, CLIP_L, 32000)
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text, **LONG), image_token_id=last, image_token_index=last,
        image_seq_length=(vision["image_size"] // 14) ** 2,
    )  # fmt: skip


def llava_next(tiny: bool) -> PreTrainedConfig:
    """LLaVA-NeXT-7B (Mistral): five crops of 576 tokens."""
    text, vision, last = (TINY, CLIP_TINY, 199) if tiny else (MISTRAL_7B, CLIP_L, 32000)
    side = 2 * vision["image_size"]
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=MistralConfig(**text, **LONG, sliding_window=None), image_token_id=last,
        image_token_index=last, image_grid_pinpoints=[[side // 2, side], [side, side // 2], [side, side]],
    )  # fmt: skip


def qwen(tiny: bool) -> PreTrainedConfig:
    """Qwen2.5-VL-7B: images of any size, clips."""
    text = TINY if tiny else QWEN_7B
    # rotary pairs per head: 64 at the real shape, in 16 + 24 + 24
    pairs = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8]
    vision: dict[str, Any] = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    if tiny:
        vision = {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "fullatt_block_indexes": [1, 3],
        }
    last = text["vocab_size"] - 1 if tiny else 151655
    vision |= {"out_hidden_size": text["hidden_size"], "patch_size": 14, "window_size": 112}
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text | LONG | {"rope_parameters": {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6}},
        image_token_id=last, video_token_id=last - 1, vision_start_token_id=last - 2, vision_end_token_id=last - 3,
    )  # fmt: skip


def five_crops(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """A square image that LLaVA-NeXT cuts into four crops and an overview."""
    side = config.vision_config.image_size
    return {"pixel_values": torch.randn(1, 5, 3, side, side), "image_sizes": torch.tensor([[2 * side, 2 * side]])}


CONFIGS: dict[str, Callable[[bool], PreTrainedConfig]] = {
    "llava-1.5-7b": llava,
    "llava-next-7b": llava_next,
    "qwen2.5-vl-7b": qwen,
}
