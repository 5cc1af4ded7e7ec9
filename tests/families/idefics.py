"""Idefics3 and SmolVLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from families.base import (
    DEPTH,
    HIDDEN,
    IMAGE,
    PAD,
    VISION_START,
    VOCAB,
    Family,
    Inputs,
    Picture,
    Row,
    attention_maps,
    noise,
    pictures_of,
)

SIDE, CELLS = 40, 5  # pixels of a crop, tokens in a row of it: 10 x 10 patches, 2 x 2 of them per token
PARTS: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 4,
    },
    "text_config": LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=DEPTH, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB,
        max_position_embeddings=512, pad_token_id=PAD, bos_token_id=1, eos_token_id=None,
    ).to_dict(),
    "image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": PAD,
}  # fmt: skip


class Idefics3(Family):
    """One crop per picture, samples padded with crops of zeros; pictures below full size are padded inside their crop."""

    name = "idefics3"
    offloaded = "nothing"  # it counts placeholders on a device without data

    def make(self) -> nn.Module:
        return Idefics3ForConditionalGeneration(Idefics3Config(**PARTS))

    def tokens(self, picture: Picture) -> int:
        return CELLS**2

    def places(self, picture: Picture) -> list[int]:
        return [VISION_START, 60 + picture.seed, *super().places(picture), VISION_START]

    def inputs(self, rows: Sequence[Row], side: str = "left") -> Inputs:
        batch = {
            name: value for name, value in super().inputs(rows, side).items() if name in ("input_ids", "attention_mask")
        }
        shown = [pictures_of([row]) for row in rows]
        most = max(map(len, shown))
        if not most:
            return batch
        pixels = torch.zeros(len(rows), most, 3, SIDE, SIDE)
        mask = torch.zeros(len(rows), most, SIDE, SIDE, dtype=torch.bool)
        for sample, pictures in enumerate(shown):
            for number, picture in enumerate(pictures):
                height, width = (min(SIDE, 8 * size) for size in (picture.height, picture.width))
                pixels[sample, number, :, :height, :width] = noise(picture.seed, 3, height, width)
                mask[sample, number, :height, :width] = True
        return batch | {"pixel_values": pixels, "pixel_attention_mask": mask}

    def pixels(self, pictures: Sequence[Picture]) -> Inputs:
        return {}

    def text(self, model: nn.Module) -> nn.Module:
        return model.model.text_model

    def spans(self, output: Any, inputs: Inputs) -> list[Tensor]:
        return list(torch.cat(output.pooler_output).unflatten(0, (-1, CELLS**2)))

    def signals(self, model: nn.Module, inputs: Inputs) -> dict[str, list[tuple[Tensor, Tensor]]]:
        attention = model.model.vision_model.encoder.layers[-1].self_attn
        images = {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask")}
        ((weights, keys),) = attention_maps(attention, lambda: model.model.get_image_features(**images))
        masks = [mask for sample in inputs["pixel_attention_mask"] for mask in sample if mask.any()]
        found = []
        for crop, mask in enumerate(masks):
            real = mask[::4, ::4].flatten()
            looked = weights[crop].mean(0)[real].sum(0)
            cells = [[2 * y * 10 + 2 * x + step for step in (0, 1, 10, 11)] for y in range(CELLS) for x in range(CELLS)]
            mean_keys = keys[crop].unflatten(-1, (4, 8)).mean(1)
            found.append(
                (torch.stack([looked[c].mean() for c in cells]), torch.stack([mean_keys[c].mean(0) for c in cells]))
            )
        return {"image": found}


class SmolVLM(Idefics3):
    name = "smolvlm"
    offloaded = "generate"

    def make(self) -> nn.Module:
        return SmolVLMForConditionalGeneration(SmolVLMConfig(**PARTS))


FAMILIES = [Idefics3(), SmolVLM()]
