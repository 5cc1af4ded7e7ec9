"""LLaVA-NeXT-Video: images as LLaVA-NeXT, videos with the patches of every frame pooled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from duet_vlm.models.adapter import Adapter, EncoderCall, Modality, RecordedQK, TowerBlocks
from duet_vlm.models.llava_next import LlavaNext
from duet_vlm.models.tower_signals import cells, patches_of


class LlavaNextVideo(LlavaNext):
    """``LlavaNextVideoForConditionalGeneration``: a video is one span; a token's importance and key are the means over
    its cell of patches, however the model itself pools features (average, maximum or convolution)."""

    family = "llava_next_video"
    model_types = ("llava_next_video",)
    video = True
    notes = "images of any size; clips, all frames reduced together; decoders of the Llama layout"
    example = "llava-hf/LLaVA-NeXT-Video-7B-hf"

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return (
            *super().modalities,
            Modality("video", "get_video_features", self.config.video_token_id, "pixel_values_videos"),
        )

    def frames(self, call: EncoderCall) -> tuple[int, int]:
        """Videos of the call, and frames of each."""
        videos, frames = call.arguments["pixel_values_videos"].shape[:2]
        return videos, frames

    def pooled_side(self) -> int:
        """Rows and columns of tokens of a frame."""
        return self.side // int(self.config.spatial_pool_stride)

    def pooled(self, signals: Tensor) -> Tensor:
        """Signals of frames [F, N, c] as the model pools its features: [F, n, c]."""
        return cells(signals, self.side, self.config.spatial_pool_stride)

    def cell_of(self, call: EncoderCall, blocks: TowerBlocks) -> int:
        return int(self.config.spatial_pool_stride) if call.stream == "video" else blocks.patch_grid

    def images_of(self, call: EncoderCall, count: int, tokens: int) -> list[tuple[int, ...]]:
        if call.stream == "image":
            return super().images_of(call, count, tokens)
        videos, frames = self.frames(call)
        return [(tokens,) * frames] * videos

    def num_separator_rows(self, call: EncoderCall, spans: int) -> list[int]:
        return super().num_separator_rows(call, spans) if call.stream == "image" else [0] * spans

    def real_patches(self, call: EncoderCall, pictures: int) -> Tensor | None:
        return super().real_patches(call, pictures) if call.stream == "image" else None

    def patches_to_tokens(self, patches: Tensor, call: EncoderCall) -> list[Tensor]:
        if call.stream == "image":
            return super().patches_to_tokens(patches, call)
        return list(self.pooled(patches).unflatten(0, self.frames(call)).flatten(1, 2))

    def importance_and_keys(
        self, calls: list[RecordedQK], call: EncoderCall, segmented: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        if call.stream == "image":
            return super().importance_and_keys(calls, call, segmented)
        (recorded,) = calls
        importance, keys = self.signals(recorded)
        videos = self.pooled(torch.cat([importance[..., None], keys], -1)).unflatten(0, self.frames(call)).flatten(1, 2)
        return list(videos[..., 0]), list(videos[..., 1:])

    def token_rows(self, rows: Tensor, call: EncoderCall) -> list[Tensor]:
        if call.stream == "image":
            return super().token_rows(rows, call)
        return list(self.pooled(rows[:, int(self.has_cls) :]).unflatten(0, self.frames(call)).flatten(1, 2))

    def unpack_to_spans(self, projected: Tensor, call: EncoderCall) -> list[Tensor]:
        return (
            super().unpack_to_spans(projected, call)
            if call.stream == "image"
            else list(projected.unflatten(0, self.frames(call)).flatten(1, 2))
        )

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
        return (
            super().grid_sizes(call, counts)
            if call.stream == "image"
            else [(self.pooled_side(), self.pooled_side())] * len(counts)
        )

    def token_coords(self, call: EncoderCall, counts: list[int]) -> list[Tensor]:
        return (
            super().token_coords(call, counts) if call.stream == "image" else Adapter.token_coords(self, call, counts)
        )

    def crop_grids(self, call: EncoderCall, counts: list[int]) -> list[tuple[int, int]]:
        return super().crop_grids(call, counts) if call.stream == "image" else Adapter.crop_grids(self, call, counts)

    def parts(self, call: EncoderCall, counts: list[int]) -> list[Tensor]:
        if call.stream == "image":
            return super().parts(call, counts)
        videos, frames = self.frames(call)
        return [torch.arange(frames, device="cpu").repeat_interleave(self.pooled_side() ** 2)] * videos

    def tokens_per_crop(self, call: EncoderCall, counts: list[int]) -> list[tuple[int, ...]]:
        if call.stream == "image":
            return super().tokens_per_crop(call, counts)
        videos, frames = self.frames(call)
        return [(self.side**2,) * frames] * videos

    def projected_rows(self, call: EncoderCall, counts: list[int]) -> list[int]:
        # videos are pooled before the projector
        return super().projected_rows(call, counts) if call.stream == "image" else counts

    def grids(self, call: EncoderCall, counts: list[int]) -> tuple[tuple[int, int] | None, ...]:
        if call.stream == "image":
            return super().grids(call, counts)
        videos, frames = self.frames(call)
        return ((frames * self.pooled_side(), self.pooled_side()),) * videos
