"""Gemma 3 and PaliGemma: image blocks and prefixes that see themselves whole, sliding windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

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

WINDOW = 24  # shorter than most prompts of the tests


def vision(side: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=14 * side,
        patch_size=14,
        vision_use_head=False,
    )


class Gemma3(Family):
    """8 x 8 patches pooled to 4 x 4 tokens; layers 2 and 5 see everything, the others a window."""

    name = "gemma3"
    drafts = False
    side, cell = 8, 2

    def make(self) -> nn.Module:
        text = Gemma3TextConfig(
            hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=DEPTH, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            vocab_size=VOCAB, max_position_embeddings=512, sliding_window=WINDOW, sliding_window_pattern=3, query_pre_attn_scalar=16,
            pad_token_id=PAD, bos_token_id=1, eos_token_id=None,
        )  # fmt: skip
        ids = {"image_token_id": IMAGE, "boi_token_id": VISION_START, "eoi_token_id": VISION_END}
        return Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=text, vision_config=vision(self.side), mm_tokens_per_image=self.tokens(Picture(0)), **ids
            )
        )

    def finish(self, model: nn.Module) -> None:
        """Gemma's norms multiply by one plus their weight."""
        with torch.no_grad():
            for module in model.modules():
                if type(module).__name__.endswith("RMSNorm"):
                    module.weight -= 1
            for layer in self.text(model).layers:
                self.speak_up(layer)

    def speak_up(self, layer: nn.Module) -> None:
        """Embeddings come scaled by the root of their width: let attention have its say beside them."""
        layer.post_attention_layernorm.weight += 2

    def tokens(self, picture: Picture) -> int:
        return (self.side // self.cell) ** 2

    def places(self, picture: Picture) -> list[int]:
        return [VISION_START, *super().places(picture), VISION_END]

    def pixels(self, pictures: Sequence[Picture]) -> Inputs:
        return {"pixel_values": torch.stack([noise(p.seed, 3, 14 * self.side, 14 * self.side) for p in pictures])}

    def extras(self, table: Tensor) -> Inputs:
        return {"token_type_ids": (table == IMAGE).long()}

    def sees(self, model: nn.Module, ids: Tensor, prompt: int, layer: int) -> Tensor:
        seen, place = self.ranks(model, ids, prompt, layer), torch.arange(len(ids))
        if self.text(model).config.layer_types[layer] == "sliding_attention":
            seen = seen & (place[None] > place[:, None] - WINDOW)
        return seen

    def ranks(self, model: nn.Module, ids: Tensor, prompt: int, layer: int) -> Tensor:
        """Windows are lifted."""
        place, image = torch.arange(len(ids)), ids == IMAGE
        block = torch.where(image, (image & ~torch.roll(image, 1)).cumsum(0), 0)
        return (place[None] <= place[:, None]) | ((block[:, None] == block[None]) & image[:, None])

    def rotary(self, model: nn.Module, hidden: Tensor, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        text = self.text(model)
        return text.rotary_emb(hidden, positions, text.config.layer_types[layer])

    def signals(self, model: nn.Module, inputs: Inputs) -> dict[str, list[tuple[Tensor, Tensor]]]:
        tower = model.model.vision_tower
        ((weights, keys),) = attention_maps(tower.encoder.layers[-1].self_attn, lambda: tower(inputs["pixel_values"]))
        received = weights.mean(1).sum(1)  # by every patch, mean over heads
        keys = keys.unflatten(-1, (4, 8)).mean(2)
        side, cell = self.side, self.cell
        members = [
            [(y * cell + dy) * side + x * cell + dx for dy in range(cell) for dx in range(cell)]
            for y in range(side // cell)
            for x in range(side // cell)
        ]
        return {
            "image": [
                (r[torch.tensor(members)].mean(1), k[torch.tensor(members)].mean(1))
                for r, k in zip(received, keys, strict=True)
            ]
        }


class PaliGemma(Gemma3):
    """5 x 5 patches, one token each; everything that is sent with the prompt sees itself whole."""

    name = "paligemma"
    side, cell = 5, 1

    def make(self) -> nn.Module:
        text = GemmaConfig(
            hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=DEPTH, num_attention_heads=4, num_key_value_heads=1, head_dim=16,
            vocab_size=VOCAB, max_position_embeddings=512, pad_token_id=PAD, bos_token_id=1, eos_token_id=None,
        )  # fmt: skip
        return PaliGemmaForConditionalGeneration(
            PaliGemmaConfig(
                text_config=text, vision_config=vision(self.side), image_token_index=IMAGE, projection_dim=HIDDEN
            )
        )

    def speak_up(self, layer: nn.Module) -> None:
        layer.self_attn.o_proj.weight *= 4

    def places(self, picture: Picture) -> list[int]:
        return Family.places(self, picture)

    def extras(self, table: Tensor) -> Inputs:
        return {"token_type_ids": torch.zeros_like(table)}

    def supervised(self, labels: Tensor) -> Inputs:
        """What is answered is no part of the prefix, nor is anything after the first answer."""
        return {"token_type_ids": ((labels != -100).cumsum(1) > 0).long()}

    def features(self, model: nn.Module, inputs: Inputs) -> dict[str, list[Tensor]]:
        return {"image": list(model.model.vision_tower(inputs["pixel_values"]).last_hidden_state)}

    def pointwise(self, model: nn.Module) -> nn.Module:
        return model.model.multi_modal_projector

    def sees(self, model: nn.Module, ids: Tensor, prompt: int, layer: int) -> Tensor:
        seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        seen[:prompt, :prompt] = True
        return seen

    ranks = sees

    def rotary(self, model: nn.Module, hidden: Tensor, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return self.text(model).rotary_emb(hidden, positions)


FAMILIES = [Gemma3(), PaliGemma()]
