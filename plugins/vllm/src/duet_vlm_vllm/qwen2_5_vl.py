"""Qwen2.5-VL, images and clips: reduced behind the merger, ranked by the attention that tokens receive in the last
block without windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from duet_vlm_vllm.grids import GridProcessor, KeptPositions


class Processor(GridProcessor, Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class DuetQwen25VL(KeptPositions, Qwen2_5_VLForConditionalGeneration):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        self.prepare(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.begin(vllm_config)
        self.begin_stages(vllm_config)

    def usual_block(self) -> int:
        return max(self.visual.fullatt_block_indexes)

    def raster(self, grids: Sequence[Sequence[int]]) -> Tensor:
        order, start = [], 0
        for t, h, w in grids:
            index, *_ = self.visual.get_window_index_thw(t, h, w)
            order.append(torch.as_tensor(index) + start)
            start += t * h * w // self.visual.spatial_merge_size**2
        return torch.argsort(torch.cat(order))
