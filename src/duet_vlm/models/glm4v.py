"""GLM-4.1V to 4.6V and GLM-OCR: a tower like Qwen2-VL's with a convolution before its merger, a decoder that rotates
pairs of channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from duet_vlm.models.adapter import Modality, Rotary, StateChange
from duet_vlm.models.llama_like import rotate
from duet_vlm.models.qwen2_vl import Qwen2VL
from duet_vlm.planning.tokens import TokenMap
from duet_vlm.profiling.model_dims import VisionDims
from duet_vlm.utils.hooks import Hooks

PAIRS = ("glm4v_text", "glm_ocr_text")  # decoders that rotate neighbouring channels; those with experts rotate halves


class Glm4V(Qwen2VL):
    """``Glm4vForConditionalGeneration`` and relatives: tokens are chosen after the merger, importance = attention
    received in the last block.

    Images and videos share one placeholder id; the prompt's video marks tell them apart. A call takes images or videos,
    not both (the stock model counts every placeholder for either). Beams get the images of their sample, which the
    stock model hands out one by one.
    """

    family = "glm4v"
    model_types = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")
    notes = "images of any size or video; dense and mixture-of-experts decoders; kept positions only (M-RoPE)"
    example = "zai-org/GLM-4.1V-9B-Thinking"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.rotate = rotate_pairs if self.config.text_config.model_type in PAIRS else rotate

    def placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> dict[str, Tensor]:
        if input_ids is None:
            return super().placeholders(input_ids, inputs_embeds)
        visual = input_ids == self.image_token_id
        begins, ends = (
            (input_ids == mark).cumsum(1) for mark in (self.config.video_start_token_id, self.config.video_end_token_id)
        )
        return {"image": visual & (begins <= ends), "video": visual & (begins > ends)}

    def placeholder_ids(self, modality: Modality, tokens: int, parts: tuple[int, ...]) -> list[int]:
        config, still = self.config, [self.image_token_id]
        frames = [
            token
            for count in parts
            for token in (config.image_start_token_id, *still * count, config.image_end_token_id)
        ]
        return frames if modality.name == "image" else [config.video_start_token_id, *frames, config.video_end_token_id]

    def install(
        self, hooks: Hooks, running: Callable[[], TokenMap | None], change_sleeping: Callable[[StateChange], None]
    ) -> None:
        model: Any = self.model

        def expand(
            input_ids: Tensor | None, mm_encoder_output: Any, expand_size: int = 1, inputs_embeds: Tensor | None = None
        ) -> Any:
            """Repeat the images of each sample as a group, with the placeholders of videos told apart for the general
            method."""
            if input_ids is not None and input_ids.numel():
                input_ids = input_ids.masked_fill(
                    self.placeholders(input_ids, None)["video"], self.config.video_token_id
                )
            return GenerationMixin._expand_multimodal_outputs(
                model, input_ids, mm_encoder_output, expand_size, inputs_embeds
            )

        hooks.shadow(model, "_expand_multimodal_outputs", expand)

    def vision_dims(self) -> VisionDims:
        vision, merger = self.config.vision_config, self.visual.merger
        unit, out = vision.spatial_merge_size**2, vision.out_hidden_size
        linear = (merger.proj, merger.gate_proj, merger.up_proj, merger.down_proj)
        return VisionDims(
            layers=vision.depth, width=vision.hidden_size, mlp=self.visual.blocks[0].mlp.gate_proj.out_features,
            mlp_matrices=3, patches_per_token=unit, extra_rows=0,
            patch_inputs=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            projector=((vision.hidden_size * unit, out), *((layer.in_features, layer.out_features) for layer in linear)),
        )  # fmt: skip


def rotate_pairs(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of neighbouring channels: x [B, H, n, d], cos and sin [B or 1, n, r]; channels from r on stay as
    they are."""
    cos, sin = (t.unsqueeze(1) for t in rotary)
    rotated, plain = x.tensor_split((cos.shape[-1],), dim=-1)
    out = rotated * cos
    out[..., ::2].addcmul_(rotated[..., 1::2], sin[..., ::2], value=-1)
    out[..., 1::2].addcmul_(rotated[..., ::2], sin[..., 1::2])
    return torch.cat((out, plain), dim=-1)
