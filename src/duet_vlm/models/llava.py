"""LLaVA-1.5: CLIP tower with CLS, point-wise projector, 1-D positions, Llama-like decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from duet_vlm.models.adapter import EncoderCall, RecordedQK, TowerBlocks
from duet_vlm.models.llama_like import LlamaLike
from duet_vlm.models.tower_signals import blocks_like_clip, cls_signals
from duet_vlm.profiling.model_dims import VisionDims


class Llava(LlamaLike):
    """``LlavaForConditionalGeneration`` with a CLIP tower; tokens are chosen before the projector, importance = CLS
    attention of the feature layer."""

    family = "llava"
    model_types = ("llava",)
    notes = "CLIP towers; images; MHA and GQA decoders of the Llama layout"
    example = "llava-hf/llava-1.5-7b-hf"
    unsupported: ClassVar[dict[str, str]] = {}
    has_cls = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.pointwise_projector = self.base.multi_modal_projector
        self.feeds_cls = getattr(self.config, "vision_feature_select_strategy", "default") == "full"
        self.side = self.patches_a_side()
        self.fixed_tokens = self.side**2 + self.feeds_cls

    @classmethod
    def serves(cls, config: Any) -> bool:
        return super().serves(config) and (config.model_type != "llava" or config.vision_config.model_type != "pixtral")

    @property
    def clip_tower(self) -> nn.Module:
        """The tower of images."""
        return self.base.vision_tower

    def blocks(self) -> nn.ModuleList:
        """The layers of the tower."""
        return self.clip_tower.encoder.layers

    def patches_a_side(self) -> int:
        """Rows, and columns, of patches of an image."""
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def check_tower(self) -> None:
        tower = type(self.clip_tower).__name__
        if not hasattr(self.clip_tower, "encoder") or "CLIP" not in tower:
            raise TypeError(f"{self.family}: the vision tower {tower} is not supported yet, only CLIP towers are")

    def check(self) -> None:
        self.check_tower()
        self.check_decoder()

    @property
    def feature_setting(self) -> str:
        """Name of the feature layer in the config and in encoder calls (VipLLaVA's is plural before transformers
        5.23)."""
        return "vision_feature_layer" if hasattr(self.config, "vision_feature_layer") else "vision_feature_layers"

    @property
    def feature_layers(self) -> Any:
        """The hidden states of the tower that are the features: an index, or several to be concatenated."""
        return getattr(self.config, self.feature_setting)

    def layers_read(self) -> list[int]:
        """Indices of the tower layers whose outputs are visual features."""
        layers = self.feature_layers
        depth = len(self.blocks())
        return [
            (i if i >= 0 else depth + 1 + i) - 1 for i in (layers if isinstance(layers, list | tuple) else [layers])
        ]

    def feature_layer(self) -> int:
        """Index of the tower layer whose output is the (last) visual feature."""
        return max(self.layers_read())

    def vision_attention(self, layer: int | None) -> nn.Module:
        return self.blocks()[self.feature_layer() if layer is None else layer].self_attn

    def unused_tower_layers(self) -> Sequence[nn.Module]:
        return self.blocks()[self.feature_layer() + 1 :]

    def uses_default_layers(self, call: EncoderCall) -> bool:
        arguments = {**call.arguments.get("kwargs", {}), **call.arguments}
        return arguments.get(self.feature_setting) in (None, self.feature_layers) and not arguments.get(
            "output_hidden_states"
        )

    def tower(self) -> nn.Module:
        return self.clip_tower

    def projector(self) -> nn.Module:
        return self.base.multi_modal_projector

    def blocks_to_reduce(self) -> tuple[TowerBlocks, ...]:
        return (self.clip_tower_blocks(self.clip_tower),)

    def clip_tower_blocks(self, tower: nn.Module) -> TowerBlocks:
        """Blocks of a CLIP tower: CLS first, every patch a token."""
        blocks = blocks_like_clip(tower.encoder.layers)
        return TowerBlocks(
            tower, tower.embeddings.patch_embedding, tower.encoder, blocks, min(self.layers_read()), num_cls=1
        )

    def layers_before_signals(self) -> Sequence[nn.Module]:
        several = isinstance(self.feature_layers, list | tuple)
        return () if several else self.blocks()[: self.feature_layer()]

    def cls_module(self) -> nn.Module:
        if isinstance(self.feature_layers, list | tuple):
            raise TypeError("cls_token=True needs one vision_feature_layer, this model joins several")
        return self.blocks()[self.feature_layer()]

    def importance_and_keys(
        self, calls: list[RecordedQK], call: EncoderCall, segmented: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        (recorded,) = calls
        importance, keys = self.signals(recorded)
        return list(importance), list(keys)

    def token_rows(self, rows: Tensor, call: EncoderCall) -> list[Tensor]:
        return list(rows) if self.num_cls_rows(call) else super().token_rows(rows, call)

    def signals(self, recorded: RecordedQK) -> tuple[Tensor, Tensor]:
        """Importance [B, N] and mean keys [B, N, d] of the patches of the tower's batch."""
        return cls_signals(recorded)

    def grids(self, call: EncoderCall, counts: list[int]) -> tuple[tuple[int, int] | None, ...]:
        return tuple(
            (math.isqrt(n), math.isqrt(n)) if math.isqrt(n) ** 2 == n else None
            for n in (c - self.feeds_cls for c in counts)
        )

    def vision_dims(self) -> VisionDims:
        vision, text, chosen = self.config.vision_config, self.config.text_config, self.feature_layers
        joined = vision.hidden_size * (len(chosen) if isinstance(chosen, list | tuple) else 1)
        return VisionDims(
            layers=vision.num_hidden_layers, width=vision.hidden_size, mlp=vision.intermediate_size, mlp_matrices=2,
            patches_per_token=1, extra_rows=int(self.has_cls), patch_inputs=vision.num_channels * vision.patch_size**2,
            unread=len(self.blocks()[self.feature_layer() + 1 :]),
            projector=((joined, text.hidden_size), (text.hidden_size, text.hidden_size)),
        )  # fmt: skip
