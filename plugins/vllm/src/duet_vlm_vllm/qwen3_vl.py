"""Qwen3-VL, images: reduced behind the mergers; rows of all depths (deepstack) stand side by side and go together."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from duet_vlm_vllm.grids import GridProcessor, KeptPositions
from duet_vlm_vllm.placeholders import ImagesOnly


class Info(ImagesOnly, Qwen3VLProcessingInfo):
    why = "its prompts show the steps of a clip between timestamps"


class Processor(GridProcessor, Qwen3VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Qwen3VLDummyInputsBuilder)
class DuetQwen3VL(KeptPositions, Qwen3VLForConditionalGeneration):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        self.prepare(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.begin(vllm_config)

    @property
    def width(self) -> int:
        return self.visual_dim
