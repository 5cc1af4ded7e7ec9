"""Decoding: one step of an attached model over one step of the plain model, both on a cache with the same rows in every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from common import Options, side_by_side
from shapes import LLAVA, TINY, Shape, build, picture, prompt, twin
from torch import Tensor, nn
from transformers import DynamicCache

import duet_vlm
from duet_vlm.measure.speed import paired

TARGET = 1.02


def run(options: Options) -> list[dict[str, Any]]:
    shape = TINY if options.quick else LLAVA
    longer = TINY if options.quick else replace(LLAVA, text=512)  # the reduced prompt itself has about 600 rows
    return [_step(options, shape, "decode step"), _step(options, longer, "decode step, long text")]


def _step(options: Options, shape: Shape, name: str) -> dict[str, Any]:
    plain = build(shape)
    attached, inputs = twin(plain), prompt(shape)
    length = inputs["input_ids"].shape[1]
    with torch.inference_mode(), duet_vlm.attach(attached, "duet", budget=0.22):
        reduced = attached(**inputs, **picture(shape), logits_to_keep=1).past_key_values
        rows = [layer.keys.shape[2] for layer in reduced.layers]
        sides = {
            "attached": _stepper(attached, reduced, length, length),
            "plain": _stepper(plain, _copy(reduced, plain), rows[0], length),
        }
        times = paired(sides, options.repeats(120), warmup=10)
    return side_by_side(name, shape, times["attached"], times["plain"], TARGET, cache_rows=rows)


def _stepper(model: nn.Module, cache: Any, masked: int, length: int) -> Callable[[], Tensor]:
    """Steps as generate() makes them: mask and position grow with every token. ``masked`` rows are behind the model's first step."""
    token, done = torch.tensor([[5]]), 0

    def step() -> Tensor:
        nonlocal done
        done += 1
        mask = torch.ones(1, masked + done, dtype=torch.long)
        position = torch.tensor([[length + done - 1]])
        return model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    return step


def _copy(cache: Any, model: nn.Module) -> DynamicCache:
    """The same keys and values on a cache that knows nothing of a reduction."""
    copied = DynamicCache(config=model.config.text_config)
    for index, layer in enumerate(cache.layers):
        copied.update(layer.keys.clone(), layer.values.clone(), index)
    return copied
