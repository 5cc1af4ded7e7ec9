"""LLaVA-OneVision with a SigLIP tower, images: crops packed as LLaVA-NeXT's, and resized where they are many."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from duet_vlm.models.towers import column_signals
from duet_vlm_vllm.llava_next import AnyRes, AnyResProcessor, NextPacking
from duet_vlm_vllm.placeholders import ImagesOnly


class Packing(NextPacking):
    @staticmethod
    def pack(config: Any, newline: Tensor, size: list[int], crops: Tensor) -> Tensor:
        model = types.SimpleNamespace(config=config, image_newline=newline)
        pack = LlavaOnevisionForConditionalGeneration._merge_image_patch_embeddings
        return pack(model, torch.tensor(size), crops, image_newline=newline, strategy="spatial_unpad")


class Info(ImagesOnly, LlavaOnevisionProcessingInfo):
    pass


class Processor(Packing, AnyResProcessor, LlavaOnevisionMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaOnevisionDummyInputsBuilder)
class DuetLlavaOnevision(Packing, AnyRes, LlavaOnevisionForConditionalGeneration):
    kind, strategy, score = "Siglip", "full", staticmethod(column_signals)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.begin(vllm_config)
