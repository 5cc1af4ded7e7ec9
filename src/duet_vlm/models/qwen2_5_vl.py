"""Qwen2.5-VL: windowed vision attention without CLS, 2x2 grid merger, M-RoPE, grouped query heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from duet_vlm.measure.shapes import DecoderShape, VisionShape, decoder_shape
from duet_vlm.models.adapter import Adapter, LlamaLike, Recorded
from duet_vlm.ops.score import column_attention


class Qwen25VL(LlamaLike, Adapter):
    """``Qwen2_5_VLForConditionalGeneration``: V2V after the merger, importance = attention received in a full-attention vision block.

    The unit of choice is a merged token (2x2 patches): scores and keys are means over its patches (released DUET-VLM code for Qwen).
    """

    family = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    notes = "images of any size; kept positions only (M-RoPE); video inputs are refused"
    example = "Qwen/Qwen2.5-VL-7B-Instruct"
    mrope = True

    def __init__(self, model: nn.Module) -> None:
        self.model, self.base = model, model.model
        self.text_model = self.base.language_model
        self.layers = self.text_model.layers
        self.config = model.config
        self.image_token_id = self.config.image_token_id
        self.visual = self.base.visual

    def check(self) -> None:
        if "sliding_attention" in self.config.text_config.layer_types:
            raise TypeError("qwen2_5_vl: sliding-window decoder layers are not supported, set use_sliding_window=False in the text config")

    def vision_attention(self, layer: int | None) -> nn.Module:
        return self.visual.blocks[max(self.visual.fullatt_block_indexes) if layer is None else layer].attn

    def importance_and_keys(self, calls: list[Recorded], call: dict[str, Any], segmented: bool) -> tuple[list[Tensor], list[Tensor]]:
        calls = [part for recorded in calls for part in segments_of(recorded)]
        if not segmented:  # one softmax over every patch of the call
            calls = [Recorded(torch.cat([c.query for c in calls], 2), torch.cat([c.key for c in calls], 2), calls[0].scaling)]
        received = torch.cat([column_attention(c.query, c.key, c.scaling)[0] for c in calls])
        keys = torch.cat([c.key[0].float() for c in calls], 1).transpose(0, 1)  # [patches, H, d]
        unit, sizes = self.visual.spatial_merge_unit, call["image_grid_thw"].tolist()
        grid = torch.tensor(sizes)  # on the host: the window index reads it many times
        order, _ = get_vision_window_index(
            grid, spatial_merge_size=self.visual.spatial_merge_size, window_size=self.visual.window_size, patch_size=self.visual.patch_size
        )
        raster = torch.argsort(order.to(received.device))
        importance = received.view(-1, unit).mean(1)[raster]
        keys = keys.reshape(-1, unit, *keys.shape[1:]).mean((1, 2))[raster]
        counts = [t * h * w // unit for t, h, w in sizes]
        return list(importance.split(counts)), list(keys.split(counts))

    def tower(self) -> nn.Module:
        return self.visual

    def projector(self) -> nn.Module:
        return self.visual.merger

    def blank_image(self) -> dict[str, Tensor]:
        vision, weight = self.config.vision_config, next(self.visual.parameters())
        side = 2 * vision.spatial_merge_size
        inputs = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.zeros(side * side, inputs, dtype=weight.dtype, device=weight.device)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]], device=weight.device)}

    def grids(self, call: dict[str, Any], counts: list[int]) -> tuple[tuple[int, int] | None, ...]:
        size = self.visual.spatial_merge_size
        return tuple((t * h // size, w // size) for t, h, w in call["image_grid_thw"].tolist())

    def decoder_shape(self) -> DecoderShape:
        return decoder_shape(self.config.text_config)

    def vision_shape(self) -> VisionShape:
        vision = self.config.vision_config
        unit = vision.spatial_merge_size**2
        wide = vision.hidden_size * unit
        return VisionShape(
            layers=vision.depth, width=vision.hidden_size, mlp=vision.intermediate_size, mlp_matrices=3, patches_per_token=unit,
            extra_rows=0,
            patch_inputs=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            projector=((wide, wide), (wide, vision.out_hidden_size)),
            full_layers=len(vision.fullatt_block_indexes), window=(vision.window_size // vision.patch_size) ** 2,
        )  # fmt: skip


def segments_of(recorded: Recorded) -> list[Recorded]:
    """Split a packed call (flash attention) into the segments that the tower attends within."""
    if recorded.segments is None:
        return [recorded]
    lengths = recorded.segments.tolist()
    pairs = zip(recorded.query.split(lengths, 2), recorded.key.split(lengths, 2), strict=True)
    return [Recorded(query, key, recorded.scaling) for query, key in pairs]
