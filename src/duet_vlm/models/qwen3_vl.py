"""Qwen3-VL: as Qwen2-VL, with visual features of several depths that are added after the first decoder layers
(deepstack)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from duet_vlm.models.adapter import Modality, StateChange
from duet_vlm.models.qwen2_vl import Qwen2VL, frames_apart
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.planning.tokens import TokenMap
from duet_vlm.profiling.model_dims import VisionDims
from duet_vlm.utils.hooks import Hooks


class Qwen3VL(Qwen2VL):
    """``Qwen3VLForConditionalGeneration``: tokens are chosen after the mergers, once for the features of every depth;
    any layer may drop.

    The prompt shows the frames of a video apart, a timestamp before each; the video is one span all the same.
    Timestamps are text.
    """

    family = "qwen3_vl"
    model_types = ("qwen3_vl", "qwen3_vl_moe")
    notes = "images of any size, video; dense and mixture-of-experts decoders; kept positions only (M-RoPE)"
    example = "Qwen/Qwen3-VL-8B-Instruct"

    def placeholder_ids(self, modality: Modality, tokens: int, parts: tuple[int, ...]) -> list[int]:
        return frames_apart(self.config, modality, parts)

    def install(
        self, hooks: Hooks, running: Callable[[], TokenMap | None], change_sleeping: Callable[[StateChange], None]
    ) -> None:
        stock = self.text_model._deepstack_process

        def add_to_survivors(hidden: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
            """Add to ``hidden`` [B, T, D] the features of the kept tokens; ``visual_embeds`` [n, D] are those of a
            whole prompt [B, S]."""
            tokens = running()
            if tokens is None:
                return stock(hidden, visual_pos_masks, visual_embeds)
            number = (visual_pos_masks.flatten().cumsum(0) - 1).clamp(min=0).view_as(visual_pos_masks)

            def added(hidden: Tensor, tokens: TokenMap) -> Tensor:
                rows = visual_embeds.to(hidden.device, hidden.dtype)
                kept_rows = rows[gather_rows(number, tokens.prompt_index.to(number.device)).to(hidden.device)]
                return hidden + torch.where(tokens.visual.to(hidden.device)[..., None], kept_rows, 0)

            change_sleeping(added)
            return added(hidden, tokens)

        hooks.shadow(self.text_model, "_deepstack_process", add_to_survivors)

    def vision_dims(self) -> VisionDims:
        vision = self.config.vision_config
        return self._vision_shape(
            vision.hidden_size, vision.intermediate_size, 2, vision.out_hidden_size, vision.deepstack_visual_indexes
        )
