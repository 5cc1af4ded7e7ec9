"""Mistral 3 and Pixtral: images of any size packed into one row of the tower, line breaks between the rows of an image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor, nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)

from families.base import DEPTH, HIDDEN, IMAGE, PAD, VOCAB, Family, Inputs, Picture, attention_maps, noise

PATCH, BREAK, END = 4, 95, 94


def vision() -> PixtralVisionConfig:
    return PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=128,
        patch_size=PATCH,
        head_dim=16,
    )


def text(window: int | None = None) -> MistralConfig:
    return MistralConfig(
        hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=DEPTH, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=VOCAB, max_position_embeddings=1024, sliding_window=window, pad_token_id=PAD, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip


def looked(tower: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """One image [3, H, W] alone in the tower: attention received by its patches [n] in the last layer, and their mean
    rotated keys [n, d]."""
    attention, rotary = tower.transformer.layers[-1].attention, []
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: rotary.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    ((weights, keys),) = attention_maps(attention, lambda: tower(pixels[None]))
    hook.remove()
    (cos, sin), k = rotary[0], keys[0].unflatten(-1, (attention.num_heads, -1))
    half = k.shape[-1] // 2
    turned = k * cos[:, None] + torch.cat([-k[..., half:], k[..., :half]], -1) * sin[:, None]
    return weights[0].mean(0).sum(0), turned.mean(1)


class Mistral3(Family):
    """``merge`` x ``merge`` patches are a token; images with an even number of lines have a line of patches more than
    their tokens need."""

    name = "mistral3"
    merge, spare = 2, 1
    window: int | None = None

    def make(self) -> nn.Module:
        config = Mistral3Config(
            vision_config=vision(),
            text_config=text(self.window),
            image_token_index=IMAGE,
            spatial_merge_size=2,
            tie_word_embeddings=False,
        )
        return Mistral3ForConditionalGeneration(config)

    def patches(self, picture: Picture) -> tuple[int, int]:
        return self.merge * picture.height + self.spare * (picture.height % 2 == 0), self.merge * picture.width

    def tokens(self, picture: Picture) -> int:
        return picture.height * picture.width

    def places(self, picture: Picture) -> list[int]:
        lines = [[IMAGE] * picture.width + [BREAK] for _ in range(picture.height)]
        return [*sum(lines, [])[:-1], END]

    def pixels(self, pictures: Sequence[Picture]) -> Inputs:
        sizes = [tuple(PATCH * n for n in self.patches(p)) for p in pictures]
        height, width = (max(side) for side in zip(*sizes, strict=True))
        return {
            "pixel_values": torch.stack(
                [
                    nn.functional.pad(noise(p.seed, 3, h, w), (0, width - w, 0, height - h))
                    for p, (h, w) in zip(pictures, sizes, strict=True)
                ]
            ),
            "image_sizes": torch.tensor(sizes),
        }

    def signals(self, model: nn.Module, inputs: Inputs) -> dict[str, list[tuple[Tensor, Tensor]]]:
        found = []
        for (height, width), pixels in zip(inputs["image_sizes"].tolist(), inputs["pixel_values"], strict=True):
            importance, keys = looked(model.model.vision_tower, pixels[:, :height, :width])
            columns, cell = width // PATCH, list(product(range(self.merge), repeat=2))
            tokens = product(range(height // PATCH // self.merge), range(columns // self.merge))
            groups = [
                [(self.merge * row + i) * columns + self.merge * column + j for i, j in cell] for row, column in tokens
            ]
            found.append((importance[torch.tensor(groups)].mean(1), keys[torch.tensor(groups)].mean(1)))
        return {"image": found}


class Windows(Mistral3):
    """Every decoder layer sees a window that is shorter than most prompts; the decoder makes its masks by itself."""

    name = "mistral3_windows"
    window = 24
    drafts = False

    def answers(self, model: nn.Module) -> bool:
        return model.config.model_type == "mistral3" and model.config.text_config.sliding_window is not None

    def sees(self, model: nn.Module, ids: Tensor, prompt: int, layer: int) -> Tensor:
        place = torch.arange(len(ids))
        return (place[None] <= place[:, None]) & (place[None] > place[:, None] - self.window)

    def ranks(self, model: nn.Module, ids: Tensor, prompt: int, layer: int) -> Tensor:
        """Windows are lifted."""
        return torch.ones(len(ids), len(ids), dtype=torch.bool).tril()


class Pixtral(Mistral3):
    """LLaVA's class with a Pixtral tower: every patch is a token."""

    name = "pixtral"
    merge, spare = 1, 0

    def make(self) -> nn.Module:
        config = LlavaConfig(
            vision_config=vision(), text_config=text(), image_token_index=IMAGE, image_token_id=IMAGE, vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )  # fmt: skip
        return LlavaForConditionalGeneration(config)

    def answers(self, model: nn.Module) -> bool:
        return model.config.model_type == "llava" and model.config.vision_config.model_type == "pixtral"


FAMILIES: list[Family] = [Mistral3(), Windows(), Pixtral()]
