"""LLaVA-OneVision with a SigLIP tower. Images: crops packed as LLaVA-NeXT's, and resized where they are many. Clips:
frames pooled, one newline."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from duet_vlm.models.tower_signals import column_signals
from duet_vlm.serve.first_stage import reduce_rows
from duet_vlm_vllm.llava_next import AnyRes, AnyResProcessor, NextPacking
from duet_vlm_vllm.placeholders import TextBehind
from duet_vlm_vllm.tower import batches, budgets, take_budgets


class ClipPacking(NextPacking):
    @staticmethod
    def pack(config: Any, newline: Tensor, size: list[int], crops: Tensor) -> Tensor:
        model = types.SimpleNamespace(config=config, image_newline=newline)
        pack = LlavaOnevisionForConditionalGeneration._merge_image_patch_embeddings
        return pack(model, torch.tensor(size), crops, image_newline=newline, strategy="spatial_unpad")


class Processor(ClipPacking, AnyResProcessor, LlavaOnevisionMultiModalProcessor):
    counted: ClassVar[dict[str, str]] = {"image": "pixel_values", "video": "pixel_values_videos"}

    def spans(self, kind: str, mm_items: Any, number: int, item: Any, tokens: int) -> list[Tensor]:
        if kind == "image":
            return super().spans(kind, mm_items, number, item, tokens)
        return [frames_of(mm_items["video"].get_num_frames(number), tokens)]


class OnevisionDummyInputs(TextBehind, LlavaOnevisionDummyInputsBuilder):
    pass


def frames_of(frames: int, tokens: int) -> Tensor:
    """The frame that each of a clip's rows shows, -1 for the newline at its end [n]."""
    return nn.functional.pad(torch.arange(frames).repeat_interleave((tokens - 1) // frames), (0, 1), value=-1)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=LlavaOnevisionProcessingInfo, dummy_inputs=OnevisionDummyInputs)
class DuetLlavaOnevision(ClipPacking, AnyRes, LlavaOnevisionForConditionalGeneration):
    kind, strategy, score = "Siglip", "full", staticmethod(column_signals)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.begin(vllm_config)
        self.begin_stages(vllm_config)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        clips = self._parse_and_validate_video_input(**kwargs)  # vLLM brings images and clips in calls of their own
        if clips is None:
            return super().embed_multimodal(**kwargs)
        asked = take_budgets(kwargs)["video"]
        given = [*clips["pixel_values_videos"]]
        return [self._clip(frames, budget) for frames, budget in zip(given, budgets(asked, len(given)), strict=True)]

    def _clip(self, frames: Tensor, asked: float) -> Tensor:
        """The rows that enter of one clip [F, 3, h, w]: its frames go through the tower in runs, as they do not see
        each other there."""
        calls = [self._frames(frames[run.start : run.stop]) for run in batches([self.patches] * len(frames), self.most)]
        rows, *signals = (torch.cat(some).flatten(0, 1) for some in zip(*calls, strict=True))
        rows = torch.cat([rows, self.image_newline[None].to(rows)])
        ranked = None
        if signals:
            importance, keys = (nn.functional.pad(some, (0, 0, 0, 1)) for some in signals)
            ranked = [importance[:, 0]], [keys]
        ((kept, _),) = reduce_rows(
            self.duet, [rows], [frames_of(len(frames), len(rows))], [asked], ranked, stream="video"
        )
        return kept

    def _frames(self, frames: Tensor) -> Sequence[Tensor]:
        """Pooled rows [F, n, D] of frames, and their importance [F, n, 1] and keys [F, n, d] where the method reads
        them."""
        rows, signals = self._video_pixels_to_features(self.vision_tower, frames), self.signals()
        if signals is None:
            return (rows,)
        return rows, self.apply_pooling(signals[0][..., None]), self.apply_pooling(signals[1])
