"""Qwen2.5-VL: as Qwen2-VL, with most vision blocks attending within windows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from duet_vlm.measure.shapes import VisionShape
from duet_vlm.models.qwen2_vl import Qwen2VL


class Qwen25VL(Qwen2VL):
    """``Qwen2_5_VLForConditionalGeneration``: V2V after the merger, importance = attention received in a full-attention vision block.

    The unit of choice is a merged token (2x2 patches): scores and keys are means over its patches (released DUET-VLM code for Qwen).
    """

    family = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    example = "Qwen/Qwen2.5-VL-7B-Instruct"

    def vision_attention(self, layer: int | None) -> nn.Module:
        return self.visual.blocks[max(self.visual.fullatt_block_indexes) if layer is None else layer].attn

    def raster(self, sizes: list[list[int]]) -> Tensor:
        sides = {"spatial_merge_size": self.visual.spatial_merge_size, "window_size": self.visual.window_size, "patch_size": self.visual.patch_size}
        with torch.device("cpu"):  # on the host, whatever the default device: the window index reads its grid many times
            order, _ = get_vision_window_index(torch.tensor(sizes, device="cpu"), **sides)
        return torch.argsort(order)

    def vision_shape(self) -> VisionShape:
        vision = self.config.vision_config
        windows = {"full_layers": len(vision.fullatt_block_indexes), "window": (vision.window_size // vision.patch_size) ** 2}
        return self._vision_shape(vision.hidden_size, vision.intermediate_size, 3, vision.out_hidden_size, **windows)
