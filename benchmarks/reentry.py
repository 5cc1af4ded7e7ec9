"""Tokens that come back: time to the first token, and of a step behind it, over that of the same method with drops, at
equal mean tokens.

What re-entry adds is the choice in front of every layer, which makes keys of all tokens that entered; a decoder with
grouped keys makes fewer of them. "alvts" chooses among all tokens of the picture and by their attention among
themselves, too: what that costs beside `duet_plus` is told without a target.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from common import Options, side_by_side
from decode import stepper
from prefill import reader
from shapes import LLAVA, TINY, Shape, build, picture, prompt, twin

import duet_vlm
from duet_vlm.profiling.timing import time_paired

BUDGETS = (0.22, 0.11)
TARGETS = {"a key for every head": 1.05, "grouped keys": 1.02}  # what it may cost, at 11 %
STEP_TARGET = 1.02
WAKES = {"options": {"reentry": "layer"}}


def run(options: Options) -> list[dict[str, Any]]:
    shape = TINY if options.quick else LLAVA
    grouped = replace(shape, kv_heads=shape.heads // 4)
    return [
        *_prefill(options, shape, "a key for every head"),
        *_prefill(options, grouped, "grouped keys"),
        _step(options, shape),
    ]


def _prefill(options: Options, shape: Shape, keys: str) -> list[dict[str, Any]]:
    plain, rows = build(shape), []
    for budget in BUDGETS:
        sides, predicted = {}, {}
        with torch.inference_mode(), ExitStack() as attached:
            for label, method, fields in (
                ("drops", "duet_plus", {}),
                ("re-entry", "duet_plus", WAKES),
                ("alvts", "alvts", {}),
            ):
                model = twin(plain)
                handle = attached.enter_context(duet_vlm.attach(model, method, budget=budget, **fields))
                sides[label] = reader(model, shape, encoded=False)
                sides[label]()
                predicted[label] = handle.report().observed.flops
            times = time_paired(sides, options.repeats(15), warmup=1)
        for label, target in (("re-entry", TARGETS[keys] if budget == 0.11 else None), ("alvts", None)):
            rows.append(
                side_by_side(
                    f"{label} over drops at {budget:.0%}, {keys}", shape, times[label], times["drops"], target,
                    predicted=predicted[label] / predicted["drops"],
                )
            )  # fmt: skip
    return rows


def _step(options: Options, shape: Shape) -> dict[str, Any]:
    """A step on the caches of both, which hold the same number of rows on average."""
    plain, sides, held = build(shape), {}, {}
    inputs, image = prompt(shape), picture(shape)
    real = inputs["attention_mask"]
    with torch.inference_mode(), ExitStack() as attached:
        for label, fields in (("drops", {}), ("re-entry", WAKES)):
            model = twin(plain)
            attached.enter_context(duet_vlm.attach(model, "duet_plus", budget=0.11, **fields))
            cache = model(**inputs, **image, logits_to_keep=1).past_key_values
            held[label] = [layer.keys.shape[2] for layer in cache.layers]
            sides[label] = stepper(model, cache, real, real.sum(1))
        times = time_paired(sides, options.repeats(120), warmup=10)
    name = "re-entry over drops at 11%, a step"
    return side_by_side(name, shape, times["re-entry"], times["drops"], STEP_TARGET, cache_rows=held)
