"""Qwen2.5-VL: as Qwen2-VL, with most vision blocks attending within windows."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from duet_vlm.models.qwen2_vl import Qwen2VL
from duet_vlm.ops.ragged import upload
from duet_vlm.profiling.model_dims import VisionDims


class Qwen25VL(Qwen2VL):
    """``Qwen2_5_VLForConditionalGeneration``: tokens are chosen after the merger, importance = attention received in a
    full-attention block.

    The unit of choice is a merged token (2x2 patches): scores and keys are means over its patches (released DUET-VLM
    code for Qwen).
    """

    family = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    example = "Qwen/Qwen2.5-VL-7B-Instruct"

    def vision_attention(self, layer: int | None) -> nn.Module:
        return self.visual.blocks[max(self.visual.fullatt_block_indexes) if layer is None else layer].attn

    def attends_globally(self, layer: int) -> bool:
        return layer % len(self.visual.blocks) in self.visual.fullatt_block_indexes

    def raster(self, sizes: list[list[int]]) -> Tensor:
        return torch.argsort(self.windows(sizes)[0])

    def windows(self, sizes: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Merged tokens window by window [U], and the borders of the windows [windows + 1], in patches."""
        return _windows(
            tuple(map(tuple, sizes)), self.visual.spatial_merge_size, self.visual.window_size, self.visual.patch_size
        )

    def tables(self, grid: Tensor, units: Tensor, counts: tuple[int, ...]) -> tuple[dict[str, Any], Tensor, Tensor]:
        """See ``VarlenTower``. The blocks work window by window; windows without kept tokens vanish."""
        made, *_ = super().tables(grid, units, counts)
        unit = self.visual.spatial_merge_unit
        order, ends = (upload(table, units.device) for table in self.windows(grid.tolist()))
        alive = torch.zeros(len(order), dtype=torch.long, device=units.device).index_fill(0, units, 1)
        slots = alive[order].sort(descending=True, stable=True).indices[: len(units)]
        there = (alive.cumsum(0) - 1)[order[slots]]
        left = torch.nn.functional.pad(alive[order].cumsum(0), (1, 0))[ends // unit] * unit
        return made | {"window_index": there, "cu_window_seqlens": left.unique_consecutive().int()}, there, slots

    def vision_dims(self) -> VisionDims:
        vision = self.config.vision_config
        windows = {
            "full_layers": len(vision.fullatt_block_indexes),
            "window": (vision.window_size // vision.patch_size) ** 2,
        }
        return self._vision_shape(vision.hidden_size, vision.intermediate_size, 3, vision.out_hidden_size, **windows)


@lru_cache(maxsize=256)
def _windows(sizes: tuple[tuple[int, ...], ...], merge: int, window: int, patch: int) -> tuple[Tensor, Tensor]:
    """Window order and borders, made once for images of the same sizes, on the host whatever the default device (many
    small reads of the grid)."""
    with torch.inference_mode(False), torch.device("cpu"):
        return get_vision_window_index(
            torch.tensor(sizes, device="cpu"), spatial_merge_size=merge, window_size=window, patch_size=patch
        )
