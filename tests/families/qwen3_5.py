"""Qwen3.5, dense and with experts: linear and full attention mixed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from families.qwen import QWEN_IDS, qwen_text
from families.qwen3 import EXPERTS, VISION, Qwen3

# the chunked delta rule rounds by where its chunks begin, and the norm behind it stretches small rows: a large epsilon
# bounds that
EPS = 3e-2
# one layer of attention in front of every drop that the tests make; the released models have LLLF repeated
KINDS = "LFLLFLLF"
NAMES = {"L": "linear_attention", "F": "full_attention"}


def hybrid_text(kinds: str = KINDS) -> dict[str, Any]:
    return qwen_text() | {
        "head_dim": 16, "layer_types": [NAMES[kind] for kind in kinds], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 3, "rms_norm_eps": EPS,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
        },
    }  # fmt: skip


class Qwen35(Qwen3):
    name = "qwen3_5"
    turned = 8
    drafts = False  # the state of a linear layer cannot go back

    def make(self) -> nn.Module:
        return Qwen3_5ForConditionalGeneration(
            Qwen3_5Config(vision_config=VISION, text_config=hybrid_text(), **QWEN_IDS)
        )

    def run(self, model: nn.Module, index: int, hidden: Tensor, seen: Tensor, **arguments: Any) -> Tensor:
        """A recurrence cannot be masked: linear layers run on the rows that take part, without anything between them."""
        if KINDS[index] == "F":
            return super().run(model, index, hidden, seen, **arguments)
        rows = super().run(model, index, hidden[:, seen], seen, position_embeddings=None)
        return hidden.masked_scatter(seen[None, :, None], rows)

    def ranking(self, layer: int) -> int:
        return KINDS.rindex("F", 0, layer + 1)


class Qwen35Moe(Qwen35):
    name = "qwen3_5_moe"

    def make(self) -> nn.Module:
        text = hybrid_text() | EXPERTS | {"shared_expert_intermediate_size": 32}
        return Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(vision_config=VISION, text_config=text, **QWEN_IDS))


FAMILIES = [Qwen35(), Qwen35Moe()]
