"""Decoding: one step of an attached model over one step of the plain model, both on a cache with the same rows in every
layer.

Padded: a batch of two prompts, one of them shorter. The plain side has one mask for all layers, so it can only follow a
method that drops nothing inside the decoder (VisionZip). DUET's cache has three lengths and as many masks; its plain
side reads the same caches without any mask.
"""

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
from duet_vlm.profiling.timing import time_paired

TARGET, PADDED_TARGET = 1.02, 1.05


def run(options: Options) -> list[dict[str, Any]]:
    shape = TINY if options.quick else LLAVA
    longer = TINY if options.quick else replace(LLAVA, text=512)  # the reduced prompt itself has about 600 rows
    return [
        _step(options, shape, "decode step"),
        _step(options, longer, "decode step, long text"),
        _step(
            options, shape, "decode step, padded, visionzip", "visionzip", shorter=shape.text // 2, target=PADDED_TARGET
        ),
        _step(
            options,
            shape,
            "decode step, padded, duet over no mask",
            shorter=shape.text // 2,
            target=PADDED_TARGET,
            masks=False,
        ),
    ]


def _step(
    options: Options,
    shape: Shape,
    name: str,
    method: str = "duet",
    shorter: int = 0,
    target: float = TARGET,
    masks: bool = True,
) -> dict[str, Any]:
    """``shorter``: a second prompt that is so many words shorter. ``masks``: whether the plain side is given the
    padding."""
    plain = build(shape)
    attached, inputs, images = twin(plain), prompt(shape), picture(shape)
    if shorter:
        inputs, images = _with_shorter(inputs, shorter), {name: torch.cat([one, one]) for name, one in images.items()}
    real = inputs["attention_mask"]
    with torch.inference_mode(), duet_vlm.attach(attached, method, budget=0.22):
        reduced = attached(**inputs, **images, logits_to_keep=1).past_key_values
        rows = [layer.keys.shape[2] for layer in reduced.layers]
        left = real[:, : rows[0]] if masks else real.new_ones(len(real), rows[0])  # padding is in front on both sides
        sides = {
            "attached": stepper(attached, reduced, real, real.sum(1)),
            "plain": stepper(plain, _copy(reduced, plain), left, real.sum(1)),
        }
        times = time_paired(sides, options.repeats(120), warmup=10)
    return side_by_side(name, shape, times["attached"], times["plain"], target, cache_rows=rows)


def _with_shorter(inputs: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """The prompt, and beside it the same without its last ``by`` words, padded on the left."""
    ids = inputs["input_ids"]
    ids = torch.cat([ids, torch.cat([ids.new_zeros(1, by), ids[:, :-by]], 1)])
    mask = torch.ones_like(ids)
    mask[1, :by] = 0
    return {"input_ids": ids, "attention_mask": mask}


def stepper(model: nn.Module, cache: Any, masked: Tensor, lengths: Tensor) -> Callable[[], Tensor]:
    """Steps as generate() makes them: mask and positions grow with every token. ``masked`` [B, n]: the rows behind the
    model's first step."""
    token, done = torch.full((len(masked), 1), 5), 0

    def step() -> Tensor:
        nonlocal done
        done += 1
        mask = torch.cat([masked, masked.new_ones(len(masked), done)], 1)
        position = lengths[:, None] + done - 1
        return model(
            input_ids=token,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits

    return step


def _copy(cache: Any, model: nn.Module) -> DynamicCache:
    """The same keys and values on a cache that knows nothing of a reduction."""
    copied = DynamicCache(config=model.config.text_config)
    for index, layer in enumerate(cache.layers):
        copied.update(layer.keys.clone(), layer.values.clone(), index)
    return copied
