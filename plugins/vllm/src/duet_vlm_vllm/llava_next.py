"""LLaVA-NeXT with a CLIP tower: all crops of an image reduced together, behind projector and packing."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
    get_anyres_image_grid_shape,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from duet_vlm.serve.rows import reduced
from duet_vlm.serve.settings import REQUEST
from duet_vlm_vllm.llava import ClipTower
from duet_vlm_vllm.placeholders import FewerPlaceholders
from duet_vlm_vllm.tower import batches, budgets


def sources(config: Any, height: int, width: int) -> Tensor:
    """Which patch of all crops each packed row of an image shows, -1 for newlines: the model's own packing, run on numbers."""
    vision = config.vision_config
    crops = 1 + int(torch.tensor(get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, vision.image_size)).prod())
    patches = (vision.image_size // vision.patch_size) ** 2
    numbers = torch.arange(crops * patches, dtype=torch.float64).view(crops, patches, 1)
    stand_in = types.SimpleNamespace(config=config, image_newline=torch.full((1,), -1.0, dtype=torch.float64))
    size = torch.tensor([height, width])
    return LlavaNextForConditionalGeneration._merge_image_patch_embeddings(stand_in, size, numbers, strategy="spatial_unpad")[:, 0].long()


def parts_of(source: Tensor, patches: int) -> Tensor:
    """The crop that each row shows, -1 for newlines."""
    return torch.where(source < 0, -1, source // patches)


class Processor(FewerPlaceholders, LlavaNextMultiModalProcessor):
    def parts(self, mm_items: Any, number: int, tokens: int) -> Tensor:
        size = mm_items["image"].get_image_size(number)
        config = self.info.get_hf_config()
        vision = config.vision_config
        return parts_of(sources(config, size.height, size.width), (vision.image_size // vision.patch_size) ** 2)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder)
class DuetLlavaNext(ClipTower, LlavaNextForConditionalGeneration):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.begin(vllm_config)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        asked = kwargs.pop(REQUEST, None)
        images = self._parse_and_validate_image_input(**kwargs)
        if images is None:
            return []
        if images["type"] == "image_embeds":
            return self._process_image_input(images)
        crops, sizes = images["pixel_values"], images["image_sizes"].tolist()
        wanted = budgets(asked, len(crops))
        out: list[Tensor] = []
        for run in batches([len(some) * self.patches for some in crops], self.most):
            some = slice(run.start, run.stop)
            out += self._reduced([*crops[some]], sizes[some], wanted[some])
        return out

    def _reduced(self, crops: list[Tensor], sizes: list[list[int]], asked: list[float]) -> list[Tensor]:
        counts = [len(some) for some in crops]
        projected = self.multi_modal_projector(self._image_pixels_to_features(self.vision_tower, torch.cat(crops)))
        rows = [
            self._merge_image_patch_embeddings(torch.tensor(size), some, strategy="spatial_unpad")
            for size, some in zip(sizes, projected.split(counts), strict=True)
        ]
        source = [sources(self.config, *size) for size in sizes]
        signals = self.signals()
        if signals is not None:
            place = [one.clamp(min=0).to(projected.device) for one in source]
            signals = tuple(
                [some.flatten(0, 1)[there] for some, there in zip(signal.split(counts), place, strict=True)] for signal in signals
            )
        parts = [parts_of(one, self.patches) for one in source]
        return [row for row, _ in reduced(self.duet, rows, parts, asked, signals)]
