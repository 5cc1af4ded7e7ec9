"""Reference selections at the LLM input: what no method can know (oracle), what anybody can do (random), and CLS attention.

They hand the language model a subset of the visual tokens at their original positions. Accuracy of a real method should be
read against these rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from . import Sample
from .scenes import GRID

SELECTIONS = ("random", "uniform", "cls", "oracle")


def uniform_patches(keep: int) -> np.ndarray:
    """``keep`` patches spread evenly in reading order, with the columns staggered from row to row."""
    return np.floor((np.arange(keep) + 0.5) * GRID * GRID / keep).astype(int)


@torch.no_grad()
def tower_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Projected visual tokens (B, 256, D) and the attention of CLS in the feature layer, mean over heads (B, 256)."""
    tower, kept = model.model.vision_tower, {}
    attention = tower.encoder.layers[model.config.vision_feature_layer].self_attn
    hooks = [
        getattr(attention, name).register_forward_hook(lambda _m, _i, out, name=name: kept.__setitem__(name, out))
        for name in ("q_proj", "k_proj")
    ]
    try:
        hidden = tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
    finally:
        for hook in hooks:
            hook.remove()
    b, n, width = kept["k_proj"].shape
    size = width // attention.num_heads
    query = kept["q_proj"][:, 0].view(b, -1, 1, size)
    key = kept["k_proj"].view(b, n, -1, size).transpose(1, 2)
    cls = (query @ key.transpose(2, 3) / size**0.5).softmax(-1)[:, :, 0, 1:].mean(1)
    return model.model.multi_modal_projector(hidden[:, 1:]), cls


def choose(how: str, keep: int, cls: Tensor, items: list[Sample], rng: np.random.Generator) -> Tensor:
    """Patches to keep, (B, keep), in order.

    The oracle takes needed patches first and fills up by CLS attention, so it is never short of context.
    """
    if how not in SELECTIONS:
        raise ValueError(f"unknown selection {how!r}; use one of {', '.join(SELECTIONS)}")
    if how == "uniform":
        return torch.from_numpy(uniform_patches(keep)).expand(len(items), -1)
    if how == "random":
        score = torch.from_numpy(rng.random(cls.shape))
    elif how == "cls":
        score = cls
    else:
        score = cls + torch.from_numpy(np.stack([i.needed for i in items])).float()
    return score.topk(keep, -1).indices.sort(-1).values


@torch.no_grad()
def answer_tokens(
    model: LlavaForConditionalGeneration, inputs: dict[str, Tensor], items: list[Sample], how: str, keep: int, rng: np.random.Generator
) -> Tensor:
    """First answer token (B,) when only ``keep`` chosen visual tokens reach the LLM. Prompts hold one picture, padded on the left."""
    visual, cls = tower_features(model, inputs["pixel_values"])
    patches = choose(how, keep, cls, items, rng)
    ids = inputs["input_ids"]
    is_image = ids == model.config.image_token_id
    total = visual.shape[1]
    embeds = model.get_input_embeddings()(ids).masked_scatter(is_image[..., None], visual.to(model.dtype))
    first = is_image.float().argmax(1)
    kept = ~is_image
    kept[torch.arange(len(ids))[:, None], first[:, None] + patches] = True
    length = ids.shape[1] - total + keep
    rows = kept.nonzero()[:, 1].view(len(ids), length)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    out = model.model.language_model(
        inputs_embeds=embeds.gather(1, rows[..., None].expand(-1, -1, embeds.shape[-1])),
        attention_mask=inputs["attention_mask"].gather(1, rows),
        position_ids=positions.gather(1, rows),
        use_cache=False,
    )
    return model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
