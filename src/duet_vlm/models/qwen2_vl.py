"""Qwen2-VL: vision attention within each frame, no CLS, 2x2 grid merger, M-RoPE, grouped query heads; images and video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from duet_vlm.models.adapter import SLIDING, BlockModules, EncoderCall, Modality, RecordedQK, VarlenTower
from duet_vlm.models.llama_like import LlamaLike
from duet_vlm.models.tower_signals import packed_signals
from duet_vlm.ops.ragged import upload
from duet_vlm.profiling.model_dims import VisionDims


class Qwen2VL(LlamaLike):
    """``Qwen2VLForConditionalGeneration``: tokens are chosen after the merger, importance = attention received in the
    last vision block.

    The unit of choice is a merged token (2x2 patches, two frames of a video): scores and keys are means over its
    patches. A video is one span; attention does not cross its frames, so importance is comparable between frames of
    equal size, as all frames of a video are.
    """

    family = "qwen2_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    video = True
    notes = "images of any size, video; kept positions only (M-RoPE)"
    example = "Qwen/Qwen2-VL-7B-Instruct"
    mrope = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.visual = self.base.visual

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return (
            Modality("image", "get_image_features", self.image_token_id, "pixel_values", "image_grid_thw"),
            Modality(
                "video", "get_video_features", self.config.video_token_id, "pixel_values_videos", "video_grid_thw"
            ),
        )

    def check(self) -> None:
        if SLIDING in self.layer_types:
            raise TypeError(
                f"{self.family}: sliding-window decoder layers are not supported, set use_sliding_window=False in "
                "the text config"
            )

    def vision_attention(self, layer: int | None) -> nn.Module:
        return self.visual.blocks[-1 if layer is None else layer].attn

    def importance_and_keys(
        self, calls: list[RecordedQK], call: EncoderCall, segmented: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        unit = self.visual.config.spatial_merge_size**2
        importance, keys = packed_signals(calls, unit, segmented)
        raster = upload(self.raster(call.sizes), importance.device)
        counts = [t * h * w // unit for t, h, w in call.sizes]
        return list(importance[raster].split(counts)), list(keys[raster].split(counts))

    def token_rows(self, rows: Tensor, call: EncoderCall) -> list[Tensor]:
        unit = self.visual.config.spatial_merge_size**2
        return self.unpack_to_spans(rows.flatten(0, -2).unflatten(0, (-1, unit)).mean(1), call)

    def unpack_to_spans(self, projected: Tensor, call: EncoderCall) -> list[Tensor]:
        unit = self.visual.config.spatial_merge_size**2
        return list(
            projected[upload(self.raster(call.sizes), projected.device)].split(
                [t * h * w // unit for t, h, w in call.sizes]
            )
        )

    def patches_to_tokens(self, patches: Tensor, call: EncoderCall) -> list[Tensor]:
        unit = self.visual.config.spatial_merge_size**2
        return list(patches[0].unflatten(0, (-1, unit)).mean(1).split([t * h * w // unit for t, h, w in call.sizes]))

    def blocks_to_reduce(self) -> tuple[VarlenTower, ...]:
        visual, config = self.visual, self.visual.config
        blocks = tuple(BlockModules(block, block.attn, block.norm2, block.mlp) for block in visual.blocks)
        mergers = visual.merger, *getattr(visual, "deepstack_merger_list", ())
        return (
            VarlenTower(
                module=visual,
                unit=config.spatial_merge_size**2,
                steps=config.temporal_patch_size,
                patch=config.patch_size,
                tables=self.tables,
                block_modules=blocks,
                mergers=mergers,
            ),
        )

    def tables(self, grid: Tensor, units: Tensor, counts: tuple[int, ...]) -> tuple[dict[str, Any], Tensor, Tensor]:
        """See ``VarlenTower``. The blocks work in raster order."""
        visual, merge = self.visual, self.visual.config.spatial_merge_size
        patches = (units[:, None] * merge**2 + torch.arange(merge**2, device=units.device)).flatten()
        ends = upload([0, *counts], units.device).cumsum(0) * merge**2
        made = {
            "position_ids": upload(get_vision_position_ids(grid, merge), units.device)[patches],
            "cu_seqlens": ends.int(),
        }
        if hasattr(visual, "interpolation_mode"):
            taps = get_vision_interpolation_indices_and_weights(
                grid, visual.num_grid_per_side, visual.interpolation_mode, visual.interpolation_align_corners, merge
            )
            made |= {
                name: upload(tap, units.device)[patches]
                for name, tap in zip(("interp_indices", "interp_weights"), taps, strict=True)
            }
        return made, torch.arange(len(units), device=units.device), units

    def raster(self, sizes: list[list[int]]) -> Tensor:
        """Positions, in the blocks' order, of the merged tokens of the call in raster order."""
        return torch.arange(
            sum(t * h * w for t, h, w in sizes) // self.visual.config.spatial_merge_size**2, device="cpu"
        )

    def grids(self, call: EncoderCall, counts: list[int]) -> tuple[tuple[int, int] | None, ...]:
        size = self.visual.config.spatial_merge_size
        return tuple((t * h // size, w // size) for t, h, w in call.sizes)

    def temporal_patch_size(self) -> int:
        return int(self.config.vision_config.temporal_patch_size)

    def steps(self, call: EncoderCall) -> list[Tensor]:
        pixels = call.arguments["pixel_values_videos"].split([math.prod(size) for size in call.sizes])
        return [rows.unflatten(0, (size[0], -1)) for rows, size in zip(pixels, call.sizes, strict=True)]

    def slice_frames(self, call: EncoderCall, video: int, chosen: Sequence[int]) -> EncoderCall:
        pixels, size = self.steps(call)[video][list(chosen)], [len(chosen), *call.sizes[video][1:]]
        grid = call.arguments["video_grid_thw"].new_tensor([size])
        return EncoderCall(
            call.stream, [size], call.arguments | {"pixel_values_videos": pixels.flatten(0, 1), "video_grid_thw": grid}
        )

    def tokens_per_crop(self, call: EncoderCall, counts: list[int]) -> list[tuple[int, ...]]:
        return [(count // t,) * t for (t, _, _), count in zip(call.sizes, counts, strict=True)]

    def tower(self) -> nn.Module:
        return self.visual

    def projector(self) -> nn.Module:
        return self.visual.merger

    def blank_image(self) -> dict[str, Tensor]:
        vision, weight = self.config.vision_config, next(self.visual.parameters())
        side = 2 * vision.spatial_merge_size
        inputs = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.zeros(side * side, inputs, dtype=weight.dtype, device=weight.device)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]], device=weight.device)}

    def vision_dims(self) -> VisionDims:
        vision = self.config.vision_config
        return self._vision_shape(vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio), 2, vision.hidden_size)

    def _vision_shape(
        self, width: int, mlp: int, mlp_matrices: int, out: int, deeper: Sequence[int] = (), **windows: Any
    ) -> VisionDims:
        vision = self.config.vision_config
        unit = vision.spatial_merge_size**2
        return VisionDims(
            layers=vision.depth, width=width, mlp=mlp, mlp_matrices=mlp_matrices, patches_per_token=unit, extra_rows=0,
            patch_inputs=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            projector=((width * unit, width * unit), (width * unit, out)) * (1 + len(deeper)),
            deeper=tuple(block + 1 for block in deeper), **windows,
        )  # fmt: skip


def frames_apart(config: Any, modality: Modality, parts: tuple[int, ...]) -> list[int]:
    """Token ids of an image or video as Qwen3's prompts write it: each time step between marks of its own."""
    start, end = config.vision_start_token_id, config.vision_end_token_id
    return [token for count in parts for token in (start, *[modality.token_id] * count, end)]
