"""Idefics3 and SmolVLM: crops of one size through a SigLIP-like tower, cells of patches shuffled into one token, Llama
decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import EncoderCall, RecordedQK, TowerBlocks
from duet_vlm.models.llama_like import LlamaLike
from duet_vlm.models.tower_signals import blocks_like_clip
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.ops.score import query_attention, sample_rows
from duet_vlm.profiling.model_dims import VisionDims


class Idefics3(LlamaLike):
    """``Idefics3ForConditionalGeneration`` and ``SmolVLMForConditionalGeneration``: tokens are chosen after the
    connector.

    A span is one crop (or a frame of a video, which these models take as images): crops stand apart in the prompt, each
    after words that name its place, and no input of the model says which crops make an image. An int budget therefore
    counts per crop. Importance = attention received in the last tower layer, mean over the patches of a token; padded
    patches neither send nor receive it.
    """

    family = "idefics3"
    model_types = ("idefics3", "smolvlm")
    video = "as images"
    decoder = "text_model"
    feeds_padding = True
    notes = "images of any size and clips as frames; budgets count per crop or frame"
    example = "HuggingFaceTB/SmolVLM2-2.2B-Instruct"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.patch, self.side = self.config.vision_config.patch_size, self.config.scale_factor

    def check(self) -> None:
        self.check_decoder()

    def vision_attention(self, layer: int | None) -> nn.Module:
        return self.base.vision_model.encoder.layers[-1 if layer is None else layer].self_attn

    def importance_and_keys(
        self, calls: list[RecordedQK], call: EncoderCall, segmented: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        (recorded,) = calls
        keys = recorded.key.float().mean(1)
        valid = self.real_patches(call, len(keys))
        size = valid.float() if recorded.size is None else recorded.size * valid
        query_positions, weight = sample_rows(size > 0, recorded.sample)
        query = gather_rows(recorded.query.transpose(1, 2), query_positions).transpose(1, 2)
        keys_valid = (size > 0)[:, None].expand(-1, query_positions.shape[1], -1)
        received = query_attention(
            query, recorded.key, recorded.scaling, keys_valid, weight * size.gather(1, query_positions), size
        )
        importance = received * size.sum(1, keepdim=True)  # a sum over the queries, not their mean
        tokens = self.patches_to_tokens(torch.cat([importance[..., None], keys], -1), call)
        return [rows[:, 0] for rows in tokens], [rows[:, 1:] for rows in tokens]

    def patches_to_tokens(self, patches: Tensor, call: EncoderCall) -> list[Tensor]:
        rows, columns = self._grid(call)
        cells = patches.unflatten(1, (rows, self.side, columns, self.side))
        return list(cells.mean((2, 4)).flatten(1, 2))

    def blocks_to_reduce(self) -> tuple[TowerBlocks, ...]:
        tower = self.base.vision_model
        blocks = blocks_like_clip(tower.encoder.layers)
        return (
            TowerBlocks(
                tower, tower.embeddings.patch_embedding, tower.encoder, blocks, len(blocks) - 1, patch_grid=self.side
            ),
        )

    def _grid(self, call: EncoderCall) -> tuple[int, int]:
        """Rows and columns of a crop's tokens."""
        height, width = call.arguments["pixel_values"].shape[-2:]
        return height // self.patch // self.side, width // self.patch // self.side

    def real_patches(self, call: EncoderCall, pictures: int) -> Tensor:
        """[crops, patches] bool, False for padding. The model skips crops of zeros alone; they are found without a
        device sync."""
        pixels, mask = call.arguments["pixel_values"].flatten(0, 1), call.arguments.get("pixel_attention_mask")
        mask = torch.ones_like(pixels[:, 0], dtype=torch.bool) if mask is None else mask.flatten(0, 1)
        crops = (pixels == 0).flatten(1).all(1).int().argsort(stable=True)[:pictures]  # in order, before the empty ones
        patches = mask[crops].unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        return (patches.sum((-1, -2)) > 0).flatten(1)

    def spans(self, output: Any, call: EncoderCall) -> list[Tensor]:
        rows, columns = self._grid(call)
        return [crop for sample in output.pooler_output if len(sample) for crop in sample.split(rows * columns)]

    def grids(self, call: EncoderCall, counts: list[int]) -> tuple[tuple[int, int] | None, ...]:
        return (self._grid(call),) * len(counts)

    def tower(self) -> nn.Module:
        return self.base.vision_model

    def projector(self) -> nn.Module:
        return self.base.connector

    def blank_image(self) -> dict[str, Tensor]:
        """Of ones: an image of zeros counts as padding."""
        vision, weight = self.config.vision_config, next(self.base.vision_model.parameters())
        size = (1, 1, vision.num_channels, vision.image_size, vision.image_size)
        return {"pixel_values": torch.ones(size, dtype=weight.dtype, device=weight.device)}

    def vision_dims(self) -> VisionDims:
        vision, unit = self.config.vision_config, self.side**2
        return VisionDims(
            layers=vision.num_hidden_layers, width=vision.hidden_size, mlp=vision.intermediate_size, mlp_matrices=2,
            patches_per_token=unit, extra_rows=0, patch_inputs=vision.num_channels * vision.patch_size**2,
            projector=((vision.hidden_size * unit, self.config.text_config.hidden_size),),
        )  # fmt: skip
