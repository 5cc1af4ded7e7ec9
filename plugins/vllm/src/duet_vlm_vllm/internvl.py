"""InternVL (the checkpoints of transformers' own class), images: reduced behind the projector, each tile by itself."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from duet_vlm.models.tower_signals import cells, cls_signals
from duet_vlm.reducers.inputs import VISION_LAYER_INPUTS
from duet_vlm.serve.first_stage import reduce_rows
from duet_vlm_vllm.placeholders import FewerPlaceholders, ImagesOnly, TextBehind
from duet_vlm_vllm.settings import served
from duet_vlm_vllm.stages.model import StagedModel
from duet_vlm_vllm.tower import Recorder, batches, budgets, check_engine, layer_of, take_budgets


class InternVLInfo(ImagesOnly, InternS1ProcessingInfo):
    why = "its prompts show the frames of a clip between texts"


class Processor(FewerPlaceholders, InternS1MultiModalProcessor):
    counted: ClassVar[dict[str, str]] = {"image": "image_num_patches"}  # pixels are those of tiles

    def spans(self, kind: str, mm_items: Any, number: int, item: Any, tokens: int) -> list[Tensor]:
        of_a_tile = self.info.get_hf_processor().image_seq_length
        return [torch.zeros(of_a_tile, dtype=torch.long)] * (tokens // of_a_tile)


class InternVLDummyInputs(TextBehind, InternS1DummyInputsBuilder):
    pass


@MULTIMODAL_REGISTRY.register_processor(Processor, info=InternVLInfo, dummy_inputs=InternVLDummyInputs)
class DuetInternVL(StagedModel, InternS1ForConditionalGeneration):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.begin(vllm_config)
        self.begin_stages(vllm_config)

    def begin(self, vllm_config: VllmConfig) -> None:
        check_engine(vllm_config)
        self.duet = served(self.config, "compact")
        layers = self.vision_tower.encoder.layer
        number = layer_of(self.duet.reducer, len(layers) - 1, len(layers), len(layers))
        self.recorder = Recorder(layers[number].attention.attn, self.duet.reducer, whole=True)
        self.most = vllm_config.scheduler_config.max_num_encoder_input_tokens

    def embed_multimodal(self, **kwargs: Any) -> Any:
        asked = take_budgets(kwargs)["image"]
        images = self._parse_and_validate_image_input(**kwargs)
        if images is None:
            return []
        if images["type"] == "image_embeds":
            return self._process_vision_input(images)
        tiles = torch.as_tensor(images["num_patches"]).flatten().tolist()
        wanted = budgets(asked, len(tiles))
        out: list[Tensor] = []
        for run in batches([count * self.num_image_token for count in tiles], self.most):
            first, last = sum(tiles[: run.start]), sum(tiles[: run.stop])
            counts = tiles[run.start : run.stop]
            each = [
                budget for budget, count in zip(wanted[run.start : run.stop], counts, strict=True) for _ in range(count)
            ]
            rows = iter(self._reduced(images["pixel_values"][first:last], each))
            out += [torch.cat([next(rows) for _ in range(count)]) for count in counts]
        return out

    def _reduced(self, tiles: Tensor, asked: list[float]) -> list[Tensor]:
        self.recorder.take()
        rows = list(self.extract_feature(tiles))
        signals = None
        if self.duet.reducer.requires & VISION_LAYER_INPUTS:
            importance, keys = cls_signals(*self.recorder.take())
            both = torch.cat([importance[..., None], keys], -1)
            means = cells(both, math.isqrt(both.shape[1]), round(1 / self.downsample_ratio))
            signals = list(means[..., 0]), list(means[..., 1:])
        parts = [torch.zeros(len(row), dtype=torch.long) for row in rows]
        return [row for row, _ in reduce_rows(self.duet, rows, parts, asked, signals)]
