"""InternVL: a picture is one tile here; test_internvl.py has images of several."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

from families.base import (
    DEPTH,
    HIDDEN,
    IMAGE,
    PAD,
    VISION_END,
    VISION_START,
    VOCAB,
    Family,
    Inputs,
    Picture,
    attention_maps,
    noise,
)

SIDE = 8  # patches; half as many tokens


class InternVL(Family):
    name = "internvl"

    def make(self) -> nn.Module:
        vision = InternVLVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=4 * SIDE, patch_size=4, use_qk_norm=True,
            layer_scale_init_value=1.0,
        )  # fmt: skip
        text = Qwen2Config(
            hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=DEPTH, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB,
            max_position_embeddings=512, pad_token_id=PAD, bos_token_id=1, eos_token_id=None,
        )  # fmt: skip
        return InternVLForConditionalGeneration(
            InternVLConfig(
                vision_config=vision,
                text_config=text,
                image_token_id=IMAGE,
                image_seq_length=SIDE**2 // 4,
                tie_word_embeddings=False,
            )
        )

    def tokens(self, picture: Picture) -> int:
        return SIDE**2 // 4

    def places(self, picture: Picture) -> list[int]:
        return [VISION_START, *super().places(picture), VISION_END]

    def pixels(self, pictures: Sequence[Picture]) -> Inputs:
        return {"pixel_values": torch.stack([noise(p.seed, 3, 4 * SIDE, 4 * SIDE) for p in pictures])}

    def signals(self, model: nn.Module, inputs: Inputs) -> dict[str, list[tuple[Tensor, Tensor]]]:
        tower = model.model.vision_tower
        attention = tower.encoder.layer[-1].attention
        ((weights, keys),) = attention_maps(attention, lambda: tower(inputs["pixel_values"]))
        looked, keys = weights[:, :, 0, 1:].sum(1), attention.k_norm(keys).unflatten(-1, (4, -1)).mean(2)[:, 1:]
        half, cell = SIDE // 2, list(product(range(2), repeat=2))
        groups = torch.tensor(
            [[(2 * row + i) * SIDE + 2 * column + j for i, j in cell] for row, column in product(range(half), repeat=2)]
        )
        return {"image": [(one[groups].mean(1), key[groups].mean(1)) for one, key in zip(looked, keys, strict=True)]}


FAMILIES: list[Family] = [InternVL()]
