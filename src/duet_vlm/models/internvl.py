"""InternVL: tiles of fixed size around a tower with CLS, tokens of 2 x 2 patches by pixel shuffle."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import Adapter, BlockModules, EncoderCall, RecordedQK, TowerBlocks
from duet_vlm.models.llava import Llava
from duet_vlm.models.tower_signals import cells
from duet_vlm.profiling.model_dims import VisionDims


class InternVL(Llava):
    """``InternVLForConditionalGeneration``: tokens are chosen after the projector, importance = CLS attention of the
    feature layer, mean over the patches of a token.

    The model receives tiles without the image they belong to: every tile (and every frame of a video, which the
    processor passes as an image) is a span with a budget of its own.
    """

    family = "internvl"
    model_types = ("internvl",)
    video = "as images"
    unsupported = Adapter.unsupported
    notes = "images and frames tile by tile: a budget counts per tile; decoders of the Llama, Qwen2 or Qwen3 layout"
    example = "OpenGVLab/InternVL3-1B-hf"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.pointwise_projector = None
        self.cell = round(1 / self.config.downsample_ratio)
        self.fixed_tokens = (self.side // self.cell) ** 2

    def patches_a_side(self) -> int:
        vision = self.config.vision_config
        return int(vision.image_size[0] // vision.patch_size[0])

    def check_tower(self) -> None:
        tower = type(self.clip_tower).__name__
        if "InternVL" not in tower or self.feeds_cls:
            raise TypeError(
                "internvl: only InternVL towers with vision_feature_select_strategy='default' are supported, got "
                f"{tower} with "
                f"{self.config.vision_feature_select_strategy!r}"
            )
        height, width = self.config.vision_config.image_size
        if height != width:
            raise TypeError(f"internvl: only square tiles are supported, got image_size {height} x {width}")

    def blocks(self) -> nn.ModuleList:
        return self.clip_tower.encoder.layer

    def vision_attention(self, layer: int | None) -> nn.Module:
        return self.blocks()[self.feature_layer() if layer is None else layer].attention

    def importance_and_keys(
        self, calls: list[RecordedQK], call: EncoderCall, segmented: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        (recorded,) = calls
        importance, keys = self.signals(recorded)
        tokens = self.patches_to_tokens(torch.cat([importance[..., None], keys], -1), call)
        return [rows[:, 0] for rows in tokens], [rows[:, 1:] for rows in tokens]

    def patches_to_tokens(self, patches: Tensor, call: EncoderCall) -> list[Tensor]:
        return list(cells(patches, math.isqrt(patches.shape[1]), self.cell))  # tiles may have another size

    def blocks_to_reduce(self) -> tuple[TowerBlocks, ...]:
        tower, blocks = (
            self.clip_tower,
            tuple(BlockModules(block, block.attention, block.layernorm_after, block.mlp) for block in self.blocks()),
        )
        output_block = min(self.layers_read())
        patches = tower.embeddings.patch_embeddings.projection
        return (
            TowerBlocks(
                tower, patches, tower.encoder, blocks, output_block, num_cls=1, patch_grid=self.cell, takes_mask=False,
            ),
        )  # fmt: skip

    def cls_module(self) -> nn.Module:
        raise TypeError(
            "internvl: the projector takes cells of patches, so cls_token=True (official LLaVA presets) cannot add "
            "the CLS row"
        )

    def blank_image(self) -> dict[str, Tensor]:
        vision, weight = self.config.vision_config, next(self.clip_tower.parameters())
        size = (1, vision.num_channels, *vision.image_size)
        return {"pixel_values": torch.zeros(size, dtype=weight.dtype, device=weight.device)}

    def vision_dims(self) -> VisionDims:
        vision, text, unit = self.config.vision_config, self.config.text_config, self.cell**2
        return VisionDims(
            layers=vision.num_hidden_layers, width=vision.hidden_size, mlp=vision.intermediate_size, mlp_matrices=2,
            patches_per_token=unit, unread=len(self.unused_tower_layers()), extra_rows=1,
            patch_inputs=vision.num_channels * vision.patch_size[0] * vision.patch_size[1],
            projector=((vision.hidden_size * unit, text.hidden_size), (text.hidden_size, text.hidden_size)),
        )  # fmt: skip
