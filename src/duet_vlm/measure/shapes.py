"""The sizes that cost predictions need, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderShape:
    """A decoder: ``layers`` of width ``hidden``, ``heads`` query and ``kv_heads`` key heads of ``head_dim``, gated MLP of ``mlp``."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int


@dataclass(frozen=True)
class VisionShape:
    """A vision tower and its projector.

    ``patches_per_token`` patches make one visual token; ``extra_rows`` are CLS-like rows; ``projector`` lists (in, out) of its linear maps;
    all but ``full_layers`` layers attend within windows of ``window`` patches (None: every layer is full).
    """

    layers: int
    width: int
    mlp: int
    mlp_matrices: int
    patches_per_token: int
    extra_rows: int
    patch_inputs: int
    projector: tuple[tuple[int, int], ...]
    full_layers: int | None = None
    window: int | None = None


def decoder_shape(config: Any) -> DecoderShape:
    """Read the sizes from a Llama-like text config."""
    return DecoderShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        mlp=config.intermediate_size,
        vocab=config.vocab_size,
    )
