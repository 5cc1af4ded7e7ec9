"""LLaVA-1.5 with a CLIP tower: reduced in front of the projector."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from duet_vlm.models.tower_signals import cls_signals
from duet_vlm.reducers.inputs import VISION_LAYER_INPUTS, Input
from duet_vlm.serve.first_stage import reduce_rows
from duet_vlm_vllm.placeholders import FewerPlaceholders, TextBehind
from duet_vlm_vllm.settings import served
from duet_vlm_vllm.stages.model import StagedModel
from duet_vlm_vllm.tower import Recorder, batches, budgets, check_engine, layer_of, take_budgets


class Processor(FewerPlaceholders, LlavaMultiModalProcessor):
    pass


class LlavaDummyInputs(TextBehind, LlavaDummyInputsBuilder):
    pass


class Tower(StagedModel):
    """Base of the models around a CLIP tower, or one of its relatives.

    Attributes
    ----------
    kind, strategy : str
        The tower and the choice of its rows that a family is read with.
    score : callable
        Importance and keys from a recorded attention.
    """

    kind, strategy, score = "CLIP", "default", staticmethod(cls_signals)

    def begin(self, vllm_config: VllmConfig) -> None:
        check_engine(vllm_config)
        tower, config = type(self.vision_tower).__name__, self.config
        if self.kind not in tower or config.vision_feature_select_strategy != self.strategy:
            features = f"{tower} with {config.vision_feature_select_strategy!r} features"
            raise ValueError(
                f"{features}: this model is supported with {self.kind} towers and {self.strategy!r} features only"
            )
        self.duet = served(config, "compact")
        layers = self.vision_tower.vision_model.encoder.layers  # vLLM builds them up to the one that is read
        number = layer_of(self.duet.reducer, len(layers) - 1, config.vision_config.num_hidden_layers, len(layers))
        self.recorder = Recorder(layers[number].self_attn.attn, self.duet.reducer)
        self.most = vllm_config.scheduler_config.max_num_encoder_input_tokens

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Checkpoints that newer transformers saved lack a level of names that vLLM's tower has."""
        old, new = "vision_tower.", "vision_tower.vision_model."
        return super().load_weights(
            (name if new in name else name.replace(old, new), weight) for name, weight in weights
        )

    @property
    def patches(self) -> int:
        """Of one picture."""
        return (self.config.vision_config.image_size // self.config.vision_config.patch_size) ** 2

    def signals(self) -> tuple[Tensor, Tensor] | None:
        """Importance [crops, N] and mean keys [crops, N, d] of the call that just ran."""
        return self.score(*self.recorder.take()) if self.duet.reducer.requires & VISION_LAYER_INPUTS else None


@MULTIMODAL_REGISTRY.register_processor(Processor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputs)
class DuetLlava(Tower, LlavaForConditionalGeneration):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.begin(vllm_config)
        self.begin_stages(vllm_config)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        asked = take_budgets(kwargs)["image"]
        images = self._parse_and_validate_image_input(**kwargs)
        if images is None:
            return []
        if images["type"] == "image_embeds":
            return self._process_image_input(images)
        pixels = images["pixel_values"]
        wanted = budgets(asked, len(pixels))
        out: list[Tensor] = []
        for run in batches([self.patches] * len(pixels), self.most):
            out += self._reduced(pixels[run.start : run.stop], wanted[run.start : run.stop])
        return out

    def _reduced(self, pixels: Any, asked: list[float]) -> list[Tensor]:
        features = self._image_pixels_to_features(
            self.vision_tower, pixels if isinstance(pixels, Tensor) else torch.stack(pixels)
        )
        late = Input.PROJECTED_FEATURES in self.duet.reducer.requires
        rows = list(self.multi_modal_projector(features) if late else features)
        parts = [torch.zeros(len(row), dtype=torch.long) for row in rows]
        kept = [row for row, _ in reduce_rows(self.duet, rows, parts, asked, self.signals())]
        return kept if late else list(self.multi_modal_projector(torch.cat(kept)).split([len(row) for row in kept]))
