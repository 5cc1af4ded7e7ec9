"""Compression of the KV cache beside ours, as libraries for it work: hooks on attention that thin out what a prompt
left in each layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def pressed(model: nn.Module, share: float) -> Iterator[None]:
    """While it lasts, every decoder layer keeps, of each head, the ``share`` of a prompt's keys with the smallest norms
    (in order).

    The rule is that of arXiv 2406.11430: keys with small norms get most attention later.
    """

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None or kwargs["hidden_states"].shape[1] == 1:  # a later step
            return
        layer = cache.layers[module.layer_idx]
        count = max(1, round(share * layer.keys.shape[2]))
        stays = layer.keys.norm(dim=-1).argsort(dim=-1, stable=True)[..., :count].sort(dim=-1).values[..., None]
        layer.keys, layer.values = (
            held.gather(2, stays.expand(-1, -1, -1, held.shape[-1])) for held in (layer.keys, layer.values)
        )

    hooks = [
        layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.language_model.layers
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
