"""Stock transformers models around recorded weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)

TINY_CLIP = dict(
    hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=28, patch_size=14
)
TINY_LLAMA = dict(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
)


def query_scaled(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with the rounding of CLIP in transformers 4: the query is scaled before the product."""
    weights = (query * scaling @ key.transpose(-1, -2)).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("golden_query_scaled", query_scaled)


def llava(
    weights: dict[str, Tensor],
    image_token: int,
    vision: dict[str, Any] = TINY_CLIP,
    text: dict[str, Any] = TINY_LLAMA,
    attention: str = "sdpa",
) -> LlavaForConditionalGeneration:
    """A LLaVA whose parameters come from ``weights`` as far as these go; the parts that a case does not record are
    never run."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{k: v for k, v in vision.items() if k != "vision_model"}),
        text_config=Qwen2Config(**text) if text.get("qkv_bias") else LlamaConfig(**text),
        image_token_id=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.config._attn_implementation = "golden_query_scaled"
    model.model.language_model.config._attn_implementation = attention
    load(model, weights)
    return model


def generate(model: Any, inputs: dict[str, Tensor], tokens: int) -> Any:
    """Greedy, exactly as many tokens as were recorded: the released code's loop does not end where a sequence does."""
    for name in ("eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, None)
    return model.generate(
        **inputs, do_sample=False, max_new_tokens=tokens, return_dict_in_generate=True, output_logits=True
    )


def load(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Every recorded weight must find its place."""
    result = model.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys, f"weights without a place: {result.unexpected_keys[:5]}"


def renamed(weights: dict[str, Tensor], rules: dict[str, str]) -> dict[str, Tensor]:
    """State dict with the first matching prefix of each name replaced."""
    moved = {}
    for name, tensor in weights.items():
        old = next((old for old in rules if name.startswith(old)), None)
        assert old is not None, f"no rule for the weight {name}"
        moved[rules[old] + name.removeprefix(old)] = tensor
    return moved
