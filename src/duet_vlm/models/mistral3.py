"""Families with a Pixtral tower: Mistral 3 and Pixtral itself. Images of any size, all of a call packed into one row of
the tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import (
    Adapter,
    BlockModules,
    ConcatenatedBlocks,
    EncoderCall,
    Modality,
    RecordedQK,
    TowerBlocks,
)
from duet_vlm.models.llava import Llava
from duet_vlm.ops.score import column_attention
from duet_vlm.profiling.model_dims import VisionDims


class Mistral3(Llava):
    """``Mistral3ForConditionalGeneration``: the encoder stage works on the merged tokens of each image.

    A token's importance is the mean attention that its patches receive from their own image in the feature layer.
    Line-break tokens between the lines of an image are text and are kept.
    """

    family = "mistral3"
    model_types = ("mistral3",)
    notes = "images of any size; Mistral decoders"
    example = "mistralai/Mistral-Small-3.1-24B-Instruct-2503"
    unsupported = Adapter.unsupported
    has_cls = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.pointwise_projector, self.fixed_tokens, self.feeds_cls = None, None, False
        self.merge = int(getattr(self.config, "spatial_merge_size", 1))

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return (Modality("image", "get_image_features", self.image_token_id, "pixel_values", "image_sizes"),)

    def check_tower(self) -> None:
        tower = type(self.clip_tower).__name__
        if "Pixtral" not in tower:
            raise TypeError(f"{self.family}: the vision tower {tower} is not supported, only Pixtral towers are")

    def blocks(self) -> nn.ModuleList:
        return self.clip_tower.transformer.layers

    def vision_attention(self, layer: int | None) -> nn.Module:
        return self.blocks()[self.feature_layer() if layer is None else layer].attention

    def cls_module(self) -> nn.Module:
        raise TypeError(
            f"{self.family}: this vision tower has no CLS row, so cls_token=True (official LLaVA presets) cannot work"
        )

    def patches(self, call: EncoderCall) -> list[tuple[int, int]]:
        """Rows and columns of patches of each image."""
        size = self.clip_tower.patch_size
        return [(height // size, width // size) for height, width in call.sizes]

    def blocks_to_reduce(self) -> tuple[TowerBlocks, ...]:
        tower, output_block = self.clip_tower, min(self.layers_read())
        blocks = tuple(
            BlockModules(block, block.attention, block.ffn_norm, block.feed_forward) for block in self.blocks()
        )
        return (
            ConcatenatedBlocks(
                tower,
                tower.patch_conv,
                tower.transformer,
                blocks,
                output_block,
                patch_grid=self.merge,
                grids=self.patches,
                patch=int(tower.patch_size),
            ),
        )

    def patches_to_tokens(self, patches: Tensor, call: EncoderCall) -> list[Tensor]:
        grids = self.patches(call)
        rows = patches[0].split([high * wide for high, wide in grids])
        return [self.merged(some, grid) for some, grid in zip(rows, grids, strict=True)]

    def importance_and_keys(
        self, calls: list[RecordedQK], call: EncoderCall, segmented: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        (recorded,) = calls
        counts = [rows * columns for rows, columns in self.patches(call)]
        size = recorded.key.new_ones(1, recorded.key.shape[2]) if recorded.size is None else recorded.size
        parts = (recorded.query, recorded.key, size[:, None, :, None])
        images = zip(*(x.split(counts, 2) for x in parts), strict=True) if segmented else [parts]
        reduced = recorded.size is not None
        received = torch.cat([
            column_attention(query, key, recorded.scaling, recorded.sample, some[:, 0, :, 0] if reduced else None)[0]
            for query, key, some in images
        ])  # fmt: skip
        signals = torch.cat([received[:, None], recorded.key[0].float().mean(0)], 1)
        merged = self.patches_to_tokens(signals[None], call)
        return [rows[:, 0] for rows in merged], [rows[:, 1:] for rows in merged]

    def token_rows(self, rows: Tensor, call: EncoderCall) -> list[Tensor]:
        grids = self.patches(call)
        images = rows[0].split([height * width for height, width in grids])
        return [self.merged(image, grid) for image, grid in zip(images, grids, strict=True)]

    def unpack_to_spans(self, projected: Tensor, call: EncoderCall) -> list[Tensor]:
        return list(
            projected.flatten(0, -2).split([(h // self.merge) * (w // self.merge) for h, w in self.patches(call)])
        )

    def merged(self, signals: Tensor, grid: tuple[int, int]) -> Tensor:
        """Means over the patches of each token: [h * w, c] -> [n, c]; patches that fill no token are cut off, as the
        merger does."""
        return nn.functional.avg_pool2d(signals.t().unflatten(1, grid), self.merge).flatten(1).t()

    def grids(self, call: EncoderCall, counts: list[int]) -> tuple[tuple[int, int] | None, ...]:
        return tuple((rows // self.merge, columns // self.merge) for rows, columns in self.patches(call))

    def blank_image(self) -> dict[str, Any]:
        vision, weight = self.config.vision_config, next(self.clip_tower.parameters())
        side = 2 * self.merge * vision.patch_size  # the stock code cannot take an image of a single token
        pixels = torch.zeros(1, vision.num_channels, side, side, dtype=weight.dtype, device=weight.device)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[side, side]], device=weight.device)}

    def spare(self, call: EncoderCall) -> tuple[tuple[tuple[int, int], ...], ...]:
        grids = self.patches(call)
        high, wide = (side // self.clip_tower.patch_size for side in call.arguments["pixel_values"].shape[-2:])
        spare = [(h * w - (h // self.merge) * (w // self.merge) * self.merge**2, high * wide - h * w) for h, w in grids]
        return tuple((some,) for some in spare)

    def vision_dims(self) -> VisionDims:
        vision, text, unit = self.config.vision_config, self.config.text_config, self.merge**2
        merger = ((vision.hidden_size * unit, vision.hidden_size),) if unit > 1 else ()
        return VisionDims(
            layers=vision.num_hidden_layers, width=vision.hidden_size, mlp=vision.intermediate_size, mlp_matrices=3,
            patches_per_token=unit, unread=len(self.unused_tower_layers()), extra_rows=0,
            patch_inputs=vision.num_channels * vision.patch_size**2,
            joined="flash" not in (self.clip_tower.config._attn_implementation or ""),
            projector=(*merger, (vision.hidden_size, text.hidden_size), (text.hidden_size, text.hidden_size)),
        )  # fmt: skip


class Pixtral(Mistral3):
    """``LlavaForConditionalGeneration`` with a Pixtral tower: as Mistral 3, every patch a token."""

    family = "pixtral"
    model_types = ("llava",)
    notes = "LLaVA models with a Pixtral tower; images of any size; Mistral decoders"
    example = "mistral-community/pixtral-12b"

    @classmethod
    def serves(cls, config: Any) -> bool:
        return getattr(config, "model_type", None) == "llava" and config.vision_config.model_type == "pixtral"
