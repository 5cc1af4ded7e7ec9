"""Video-LLaVA: a CLIP tower for images and one for videos, one point-wise projector."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import EncoderCall, Modality, RecordedQK, TowerBlocks
from duet_vlm.models.llava import Llava
from duet_vlm.models.tower_signals import patches_of
from duet_vlm.profiling.model_dims import VisionDims

FIRST = 1e30  # importance of a CLS row: above any attention, and finite in sums


class VideoLlava(Llava):
    """``VideoLlavaForConditionalGeneration``: images as LLaVA; a video is one span, and the encoder stage reduces its
    frames one by one.

    The stock model feeds the CLS feature of every frame as its first token. It counts as a dominant token and is kept
    before any other.
    """

    family = "video_llava"
    model_types = ("video_llava",)
    video = True
    notes = "images, and clips frame by frame with each frame's CLS row kept; decoders of the Llama layout"
    example = "LanguageBind/Video-LLaVA-7B-hf"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.fixed_tokens = None  # videos have any length

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return (
            Modality("image", "get_image_features", self.image_token_id, "pixel_values"),
            Modality("video", "get_video_features", self.config.video_token_id, "pixel_values_videos", each=True),
        )

    @property
    def clip_tower(self) -> nn.Module:
        return self.base.image_tower

    def tower(self) -> nn.Module:
        return nn.ModuleList([self.base.image_tower, self.base.video_tower])

    def vision_attentions(self, layer: int | None) -> list[nn.Module]:
        image, video = self.base.image_tower.encoder.layers, self.base.video_tower.encoder.layers
        number = self.feature_layer() if layer is None else layer
        return [image[number].self_attn, video[number].self_attn]

    def vision_dims(self) -> VisionDims:
        return dataclasses.replace(super().vision_dims(), towers=2)

    def unused_tower_layers(self) -> list[nn.Module]:
        return [
            layer
            for tower in (self.base.image_tower, self.base.video_tower)
            for layer in tower.encoder.layers[self.feature_layer() + 1 :]
        ]

    def cls_module(self) -> nn.Module:
        raise TypeError("video_llava feeds the CLS row of every frame already: cls_token=True cannot add one")

    def projected_together(self, call: EncoderCall) -> int:
        return call.arguments["pixel_values_videos"].shape[1] if call.stream == "video" else 1

    def spans(self, output: object, call: EncoderCall) -> list[Tensor]:
        return list(output.pooler_output.unflatten(0, (-1, self.projected_together(call))).flatten(1, 2))  # type: ignore[attr-defined]

    def importance_and_keys(
        self, calls: list[RecordedQK], call: EncoderCall, segmented: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        if call.stream == "image":
            return super().importance_and_keys(calls, call, segmented)
        (recorded,) = calls
        importance, _ = self.signals(recorded)
        importance = nn.functional.pad(importance, (1, 0), value=FIRST)
        frames = (-1, self.projected_together(call))
        keys = recorded.key.float().mean(1)
        return list(importance.unflatten(0, frames).flatten(1)), list(keys.unflatten(0, frames).flatten(1, 2))

    def token_rows(self, rows: Tensor, call: EncoderCall) -> list[Tensor]:
        return self.unpack_to_spans(torch.stack(super().token_rows(rows, call)), call)

    def unpack_to_spans(self, projected: Tensor, call: EncoderCall) -> list[Tensor]:
        return list(projected.unflatten(0, (-1, self.projected_together(call))).flatten(1, 2))

    def temporal_patch_size(self) -> int:
        return 1

    def steps(self, call: EncoderCall) -> list[Tensor]:
        return [
            patches_of(frames, self.config.vision_config.patch_size) for frames in call.arguments["pixel_values_videos"]
        ]

    def slice_frames(self, call: EncoderCall, video: int, chosen: Sequence[int]) -> EncoderCall:
        pixels = call.arguments["pixel_values_videos"][video, list(chosen)][None]
        return dataclasses.replace(call, arguments=call.arguments | {"pixel_values_videos": pixels})

    def grid_sizes(self, call: EncoderCall, counts: list[int]) -> list[tuple[int, int]]:
        return [(self.side, self.side)] * len(counts)

    def num_cls_rows(self, call: EncoderCall) -> int:
        return 1 if call.stream == "video" else super().num_cls_rows(call)

    def patches_to_tokens(self, patches: Tensor, call: EncoderCall) -> list[Tensor]:
        frames = torch.stack(super().patches_to_tokens(patches, call))
        return list(frames.unflatten(0, (-1, self.projected_together(call))).flatten(1, 2))

    def blocks_to_reduce(self) -> tuple[TowerBlocks, ...]:
        return self.clip_tower_blocks(self.base.image_tower), self.clip_tower_blocks(self.base.video_tower)

    def parts(self, call: EncoderCall, counts: list[int]) -> list[Tensor]:
        frames = self.projected_together(call)
        return [torch.arange(frames, device="cpu").repeat_interleave(count // frames) for count in counts]

    def tokens_per_crop(self, call: EncoderCall, counts: list[int]) -> list[tuple[int, ...]]:
        if call.stream == "image":
            return super().tokens_per_crop(call, counts)
        return [(self.side**2,) * self.projected_together(call)] * len(counts)

    def projected_rows(self, call: EncoderCall, counts: list[int]) -> list[int]:
        return counts  # CLS tokens, too

    def grids(self, call: EncoderCall, counts: list[int]) -> tuple[tuple[int, int] | None, ...]:
        return super().grids(call, counts) if call.stream == "image" else (None,) * len(counts)
