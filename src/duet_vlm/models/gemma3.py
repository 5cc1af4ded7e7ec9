"""Gemma 3: SigLIP tower, average-pooled tokens, bidirectional attention within an image, sliding windows between full
layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import EncoderCall, RecordedQK, Rotary, TowerBlocks
from duet_vlm.models.llama_like import LlamaLike
from duet_vlm.models.tower_signals import blocks_like_clip, cells, column_signals
from duet_vlm.profiling.model_dims import VisionDims


class Gemma3(LlamaLike):
    """``Gemma3ForConditionalGeneration``: tokens are chosen after the pooling projector, importance = attention
    received in the last tower layer.

    Every image (and every crop of pan-and-scan, which the processor passes as an image of its own) is a span. Windows
    of sliding layers count prompt positions; for ranking they are lifted. With flash attention windows count the kept
    tokens.
    """

    family = "gemma3"
    model_types = ("gemma3",)
    notes = "images, pan-and-scan crops as images of their own; sliding windows count prompt slots"
    example = "google/gemma-3-4b-it"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        vision = self.config.vision_config
        self.side = vision.image_size // vision.patch_size
        self.fixed_tokens = self.tokens_per_image()
        self.cell = self.side // int(self.fixed_tokens**0.5)

    def tokens_per_image(self) -> int:
        return int(self.config.mm_tokens_per_image)

    def check(self) -> None:
        if getattr(self.config.text_config, "attn_logit_softcapping", None):
            raise TypeError(
                f"{self.family}: attention logits that are soft-capped (Gemma 2 decoders) cannot be ranked yet"
            )
        if not hasattr(self.base.vision_tower, "encoder"):
            raise TypeError(
                f"{self.family}: the vision tower {type(self.base.vision_tower).__name__} is not supported, only "
                "SigLIP is"
            )

    def vision_attention(self, layer: int | None) -> nn.Module:
        return self.base.vision_tower.encoder.layers[-1 if layer is None else layer].self_attn

    def importance_and_keys(
        self, calls: list[RecordedQK], call: EncoderCall, segmented: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        (recorded,) = calls
        importance, keys = column_signals(recorded)
        tokens = self.patches_to_tokens(torch.cat([importance[..., None], keys], -1), call)
        return [rows[:, 0] for rows in tokens], [rows[:, 1:] for rows in tokens]

    def patches_to_tokens(self, patches: Tensor, call: EncoderCall) -> list[Tensor]:
        return list(cells(patches, self.side, self.cell))

    def blocks_to_reduce(self) -> tuple[TowerBlocks, ...]:
        tower = self.base.vision_tower
        blocks = blocks_like_clip(tower.encoder.layers)
        return (
            TowerBlocks(
                tower, tower.embeddings.patch_embedding, tower.encoder, blocks, len(blocks) - 1, patch_grid=self.cell
            ),
        )

    def grids(self, call: EncoderCall, counts: list[int]) -> tuple[tuple[int, int] | None, ...]:
        side = self.side // self.cell
        return ((side, side),) * len(counts)

    def rotary(self, hidden: Tensor, position_ids: Tensor, kind: str) -> Rotary:
        return self.text_model.rotary_emb(hidden, position_ids, kind)

    def tower(self) -> nn.Module:
        return self.base.vision_tower

    def projector(self) -> nn.Module:
        return self.base.multi_modal_projector

    def vision_dims(self) -> VisionDims:
        vision, text = self.config.vision_config, self.config.text_config
        return VisionDims(
            layers=vision.num_hidden_layers, width=vision.hidden_size, mlp=vision.intermediate_size, mlp_matrices=2,
            patches_per_token=self.cell**2, extra_rows=0, patch_inputs=vision.num_channels * vision.patch_size**2,
            projector=((vision.hidden_size, text.hidden_size),),
        )  # fmt: skip
