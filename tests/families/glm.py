"""GLM-4.1V, 4.5V (experts), 4.6V and GLM-OCR."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
)

from families.base import HIDDEN, IMAGE, VIDEO, VISION_END, VISION_START, Inputs, Picture
from families.qwen import qwen_text
from families.qwen3 import Qwen3

VIDEO_START, VIDEO_END = 94, 95
GLM_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": VISION_START, "image_end_token_id": VISION_END,
    "video_start_token_id": VIDEO_START, "video_end_token_id": VIDEO_END,
}  # fmt: skip
VISION = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": HIDDEN, "num_heads": 4, "patch_size": 4, "image_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


def glm_text() -> dict[str, Any]:
    return qwen_text() | {"rope_parameters": ROPE, "attention_bias": True}


class Glm4V(Qwen3):
    """One placeholder id for images and frames; marks around a clip tell them apart; the frames of a clip stand apart."""

    name = "glm4v"
    offloaded = "nothing"  # its tower reads the position table beside the module that holds it
    mixes = False
    turned = 8

    def make(self) -> nn.Module:
        return Glm4vForConditionalGeneration(Glm4vConfig(vision_config=VISION, text_config=glm_text(), **GLM_IDS))

    def places(self, picture: Picture) -> list[int]:
        frame = [VISION_START, *[IMAGE] * (picture.height * picture.width), VISION_END]
        if not picture.frames:
            return frame
        return [VIDEO_START, *(token for number in range(picture.frames) for token in (*frame, 60 + number)), VIDEO_END]

    def extras(self, table: Tensor) -> Inputs:
        kinds = (table == IMAGE).long()
        for row, ids in enumerate(table.tolist()):
            inside = False
            for place, token in enumerate(ids):
                inside = token == VIDEO_START or inside and token != VIDEO_END
                kinds[row, place] *= 1 + inside
        return {"mm_token_type_ids": kinds}


class Glm4VMoe(Glm4V):
    name = "glm4v_moe"

    def make(self) -> nn.Module:
        text = glm_text() | EXPERTS | {"head_dim": 16}
        return Glm4vMoeForConditionalGeneration(Glm4vMoeConfig(vision_config=VISION, text_config=text, **GLM_IDS))


class Glm46V(Glm4V):
    name = "glm46v"

    def make(self) -> nn.Module:
        vision, text = (
            VISION | {"model_type": "glm4v_vision"},
            glm_text() | EXPERTS | {"head_dim": 16, "model_type": "glm4v_moe_text"},
        )
        return Glm46VForConditionalGeneration(Glm46VConfig(vision_config=vision, text_config=text, **GLM_IDS))


class GlmOcr(Glm4V):
    name = "glm_ocr"
    offloaded = "generate"

    def make(self) -> nn.Module:
        text = glm_text() | {"head_dim": 16, "intermediate_size": 80}
        return GlmOcrForConditionalGeneration(GlmOcrConfig(vision_config=VISION, text_config=text, **GLM_IDS))


FAMILIES = [Glm4V(), Glm4VMoe(), Glm46V(), GlmOcr()]
