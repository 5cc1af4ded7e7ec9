"""LLaVA-NeXT with a CLIP tower: all crops of an image reduced together, behind projector and packing."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
    get_anyres_image_grid_shape,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from duet_vlm.serve.first_stage import reduce_rows
from duet_vlm_vllm.llava import LlavaDummyInputs, Tower
from duet_vlm_vllm.placeholders import FewerPlaceholders
from duet_vlm_vllm.tower import batches, budgets, take_budgets


class NextPacking:
    """The rows that the crops of an image become: packed as the model itself does it, whatever the crops hold."""

    @staticmethod
    def pack(config: Any, newline: Tensor, size: list[int], crops: Tensor) -> Tensor:
        """Crops [n, N, c] of an image of ``size`` (height, width) -> rows [K, c], ``newline`` [c] at the end of lines."""
        model = types.SimpleNamespace(config=config, image_newline=newline)
        return LlavaNextForConditionalGeneration._merge_image_patch_embeddings(
            model, torch.tensor(size), crops, strategy="spatial_unpad"
        )

    def parts_of(self, config: Any, size: list[int]) -> Tensor:
        """The crop that each row of an image shows (of several the one that it shows most of), -1 for newlines."""
        vision = config.vision_config
        crops = 1 + int(
            torch.tensor(
                get_anyres_image_grid_shape(tuple(size), config.image_grid_pinpoints, vision.image_size)
            ).prod()
        )
        shown = torch.eye(crops)[:, None].expand(-1, (vision.image_size // vision.patch_size) ** 2, -1)
        rows = self.pack(config, torch.zeros(crops), size, shown)
        return torch.where(rows.any(1), rows.argmax(1), -1)


class AnyResProcessor(FewerPlaceholders):
    def spans(self, kind: str, mm_items: Any, number: int, item: Any, tokens: int) -> list[Tensor]:
        size = mm_items["image"].get_image_size(number)
        return [self.parts_of(self.info.get_hf_config(), [size.height, size.width])]


class AnyRes(Tower):
    """In front of a model that cuts images into crops."""

    def embed_multimodal(self, **kwargs: Any) -> Any:
        asked = take_budgets(kwargs)["image"]
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
        rows, signals = self._packed(projected, self.image_newline, sizes, counts), self.signals()
        if signals is not None:
            both = torch.cat([signals[0][..., None], signals[1]], -1)
            ranked = self._packed(both, both.new_zeros(both.shape[-1]), sizes, counts)
            signals = [some[:, 0] for some in ranked], [some[:, 1:] for some in ranked]
        parts = [self.parts_of(self.config, size) for size in sizes]
        return [row for row, _ in reduce_rows(self.duet, rows, parts, asked, signals)]

    def _packed(self, rows: Tensor, newline: Tensor, sizes: list[list[int]], counts: list[int]) -> list[Tensor]:
        """Rows [crops of all images, N, c] -> per image [n, c]."""
        return [
            self.pack(self.config, newline, size, some) for size, some in zip(sizes, rows.split(counts), strict=True)
        ]


class Processor(NextPacking, AnyResProcessor, LlavaNextMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(Processor, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputs)
class DuetLlavaNext(NextPacking, AnyRes, LlavaNextForConditionalGeneration):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.begin(vllm_config)
        self.begin_stages(vllm_config)
