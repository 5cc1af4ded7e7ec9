"""Qwen3-VL, dense and with experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from families.base import HIDDEN, VIDEO, VISION_END, VISION_START, Inputs, Picture
from families.qwen import QWEN_IDS, Qwen, qwen_text

VISION = {
    "depth": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": HIDDEN, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "in_channels": 3, "num_position_embeddings": 16,
}  # fmt: skip
DEEPSTACK = {"deepstack_visual_indexes": [0, 1, 2]}
ROPE = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 10000.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def merged_signals(attention: nn.Module, encode: Any, sizes: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per span importance and mean keys of its 2 x 2 cells, from the input of an attention with fused projections;
    frames do not see each other. Written out: projections, half-split rotary, softmax, column sums."""
    caught: list[Any] = []
    hook = attention.register_forward_pre_hook(lambda m, a, k: caught.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        encode()
        hook.remove()
        args, kwargs = caught[0]
        hidden = args[0] if args else kwargs["hidden_states"]
        cos, sin = (t[:, None] for t in kwargs["position_embeddings"])
        heads = attention.num_heads
        projected = list(attention.qkv(hidden).unflatten(-1, (3, heads, -1)).unbind(1)[:2])
        if hasattr(attention, "q_norm"):
            projected = [attention.q_norm(projected[0]), attention.k_norm(projected[1])]
        half = projected[0].shape[-1] // 2
        query, key = (t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin for t in projected)
    signals, start = [], 0
    for t, h, w in sizes.tolist():
        received, keys = [], []
        for _ in range(t):
            q, k = (x[start : start + h * w].transpose(0, 1) for x in (query, key))
            looked = (q @ k.transpose(1, 2) / (2 * half) ** 0.5).softmax(-1).mean(0).sum(0)
            received.append(looked.view(-1, 4).mean(1))
            keys.append(k.mean(0).view(len(received[-1]), 4, -1).mean(1))
            start += h * w
        signals.append((torch.cat(received), torch.cat(keys)))
    return signals


class Qwen3(Qwen):
    """The frames of a clip stand apart, each behind its timestamp."""

    def places(self, picture: Picture) -> list[int]:
        if not picture.frames:
            return super().places(picture)
        frame = [VISION_START, *[VIDEO] * (picture.height * picture.width), VISION_END]
        return [token for number in range(picture.frames) for token in (60 + number, 61, *frame)]

    def signals(self, model: nn.Module, inputs: Inputs) -> dict[str, list[tuple[Tensor, Tensor]]]:
        attention, base = model.model.visual.blocks[-1].attn, model.model
        found = {}
        if "pixel_values" in inputs:
            sizes = inputs["image_grid_thw"]
            found["image"] = merged_signals(
                attention, lambda: base.get_image_features(inputs["pixel_values"], sizes), sizes
            )
        if "pixel_values_videos" in inputs:
            moving = inputs["video_grid_thw"]
            found["video"] = merged_signals(
                attention, lambda: base.get_video_features(inputs["pixel_values_videos"], moving), moving
            )
        return found


class Qwen3VL(Qwen3):
    name = "qwen3_vl"

    def make(self) -> nn.Module:
        text = qwen_text() | {"head_dim": 16, "rope_parameters": ROPE}
        return Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(vision_config=VISION | DEEPSTACK, text_config=text, **QWEN_IDS)
        )

    def deeper(self, model: nn.Module, inputs: Inputs) -> dict[str, list[list[Tensor]]]:
        found = {}
        for stream, pixels, sizes in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            if pixels in inputs:
                levels = getattr(model.model, f"get_{stream}_features")(
                    inputs[pixels], inputs[sizes]
                ).deepstack_features
                found[stream] = [list(rows) for rows in zip(*levels, strict=True)]
        return found


class Qwen3VLMoe(Qwen3VL):
    name = "qwen3_vl_moe"

    def make(self) -> nn.Module:
        text = qwen_text() | {"head_dim": 16, "rope_parameters": ROPE} | EXPERTS
        return Qwen3VLMoeForConditionalGeneration(
            Qwen3VLMoeConfig(vision_config=VISION | DEEPSTACK, text_config=text, **QWEN_IDS)
        )


FAMILIES = [Qwen3VL(), Qwen3VLMoe()]
