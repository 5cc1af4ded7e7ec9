"""LLaVA-OneVision: any-resolution images and videos around a SigLIP tower, resized between tower and decoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from duet_vlm.models.adapter import Adapter, EncoderCall, RecordedQK, TowerBlocks
from duet_vlm.models.llava_next_video import LlavaNextVideo
from duet_vlm.models.tower_signals import blocks_like_clip, column_signals


class LlavaOnevision(LlavaNextVideo):
    """``LlavaOnevisionForConditionalGeneration``: importance = attention received by a patch in the feature layer.

    Large images and all frames are resized after the tower; signals travel through the model's own code for it. The
    newline tokens of images and the token that ends a video are separators. Only an image that is the single one of its
    prompt is cut into crops.
    """

    family = "llava_onevision"
    model_types = ("llava_onevision",)
    notes = (
        "SigLIP towers; images of any size; clips, all frames reduced together; decoders of the Llama or Qwen2 layout"
    )
    example = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
    unsupported = Adapter.unsupported
    has_cls = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.feeds_cls = False  # "full" strategy means all patches here

    def check_tower(self) -> None:
        tower = type(self.clip_tower).__name__
        if "Siglip" not in tower or self.config.vision_feature_select_strategy != "full":
            raise TypeError(
                "llava_onevision: only SigLIP towers with vision_feature_select_strategy='full' are supported, got "
                f"{tower} with "
                f"{self.config.vision_feature_select_strategy!r}"
            )

    def cls_module(self) -> nn.Module:
        raise TypeError(
            "llava_onevision: this vision tower has no CLS row, so cls_token=True (official LLaVA presets) cannot work"
        )

    def signals(self, recorded: RecordedQK) -> tuple[Tensor, Tensor]:
        return column_signals(recorded)

    def crops(self, call: EncoderCall) -> list[int]:
        together = call.numbers("batch_num_images")
        alone = [True] * len(call.sizes) if together is None else [n == 1 for n in together for _ in range(n)]
        pinpoints, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        return [
            image_size_to_num_patches(size, pinpoints, side) if one else 1
            for size, one in zip(call.sizes, alone, strict=True)
        ]

    def packed(self, signals: Tensor, call: EncoderCall) -> list[Tensor]:
        rows, _ = self.base.pack_image_features(
            signals.split(self.crops(call)),
            call.sizes,
            image_newline=signals.new_zeros(signals.shape[-1]),
            vision_aspect_ratio=call.arguments.get("vision_aspect_ratio") or self.config.vision_aspect_ratio,
        )
        return rows

    def blocks_to_reduce(self) -> tuple[TowerBlocks, ...]:
        blocks = blocks_like_clip(self.clip_tower.encoder.layers)
        tower = self.clip_tower
        return (TowerBlocks(tower, tower.embeddings.patch_embedding, tower.encoder, blocks, min(self.layers_read())),)

    def cell_of(self, call: EncoderCall, blocks: TowerBlocks) -> int:
        if call.stream == "image":
            return blocks.patch_grid
        if self.side % 2:
            raise ValueError(
                f"llava_onevision: frames of {self.side} x {self.side} patches are resized behind the vision tower, "
                "where what is left would be "
                "mixed with what is gone: use a method that reduces behind it for clips (duet, visionzip, frames)"
            )
        return 2  # half the size, without remainder: means of cells

    def patches_to_tokens(self, patches: Tensor, call: EncoderCall) -> list[Tensor]:
        rows = super().patches_to_tokens(patches, call)
        return rows if call.stream == "image" else [nn.functional.pad(some, (0, 0, 0, 1)) for some in rows]

    def num_separator_rows(self, call: EncoderCall, spans: int) -> list[int]:
        return super().num_separator_rows(call, spans) if call.stream == "image" else [1] * spans

    def _numbers(self, call: EncoderCall) -> list[Tensor]:
        crops = sum(self.crops(call))
        numbers = torch.arange(1, crops * self.side**2 + 1, dtype=torch.float64, device="cpu").view(crops, -1, 1)
        for size, rows in zip(call.sizes, self.packed(numbers, call), strict=True):
            if bool((rows % 1).any()):
                raise ValueError(
                    f"llava_onevision: an image of {size[0]} x {size[1]} pixels is resized behind the vision tower, "
                    "where what is left would be "
                    "mixed with what is gone: use a method that reduces behind it (duet, visionzip), or a smaller image"
                )
        return super()._numbers(call)

    def pooled_side(self) -> int:
        return math.ceil(self.side / 2)

    def pooled(self, signals: Tensor) -> Tensor:
        return self.base.apply_pooling(signals)

    def importance_and_keys(
        self, calls: list[RecordedQK], call: EncoderCall, segmented: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        importance, keys = super().importance_and_keys(calls, call, segmented)
        if call.stream == "image":
            return importance, keys
        return [nn.functional.pad(rows, (0, 1)) for rows in importance], [
            nn.functional.pad(rows, (0, 0, 0, 1)) for rows in keys
        ]

    def token_rows(self, rows: Tensor, call: EncoderCall) -> list[Tensor]:
        tokens = super().token_rows(rows, call)
        return tokens if call.stream == "image" else [nn.functional.pad(rows, (0, 0, 0, 1)) for rows in tokens]

    def unpack_to_spans(self, projected: Tensor, call: EncoderCall) -> list[Tensor]:
        if call.stream == "image":
            return super().unpack_to_spans(projected, call)
        return [nn.functional.pad(rows, (0, 0, 0, 1)) for rows in super().unpack_to_spans(self.pooled(projected), call)]

    def parts(self, call: EncoderCall, counts: list[int]) -> list[Tensor]:
        parts = super().parts(call, counts)
        return parts if call.stream == "image" else [nn.functional.pad(rows, (0, 1), value=-1) for rows in parts]

    def projected_rows(self, call: EncoderCall, counts: list[int]) -> list[int]:
        return Adapter.projected_rows(self, call, counts)  # videos are pooled after the projector here

    def grids(self, call: EncoderCall, counts: list[int]) -> tuple[tuple[int, int] | None, ...]:
        return (None,) * len(counts)
