"""Prefill: how many times faster the reduced prompt is read, beside what its FLOPs promise. Here ratios are plain over reduced.

"decoder" starts from an encoded image, as generate() does after its encoder call; "tower and decoder" starts from pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from common import Options, side_by_side
from shapes import LLAVA, TINY, Shape, build, picture, prompt, twin
from torch import nn

import duet_vlm
from duet_vlm.measure.speed import paired

BUDGETS = (0.33, 0.22, 0.11)
METHODS = ("duet", "visionzip", "pyramiddrop", "fastv")


def run(options: Options) -> list[dict[str, Any]]:
    shape = TINY if options.quick else LLAVA
    plain = build(shape)
    return [*_decoder(options, shape, plain), *_whole(options, shape, plain)]


def _decoder(options: Options, shape: Shape, plain: nn.Module) -> list[dict[str, Any]]:
    cases = [(method, budget) for method in METHODS for budget in BUDGETS]
    return _compare(options, shape, plain, "decoder", cases, 9, encoded=True)


def _whole(options: Options, shape: Shape, plain: nn.Module) -> list[dict[str, Any]]:
    return _compare(options, shape, plain, "tower and decoder", [("duet", budget) for budget in BUDGETS], 7, encoded=False)


def _compare(
    options: Options, shape: Shape, plain: nn.Module, name: str, cases: list[tuple[str, float]], pairs: int, encoded: bool
) -> list[dict[str, Any]]:
    """Every feasible (method, budget) in turns with the plain model; infeasible ones become rows that say so."""
    sides: dict[str, Callable[[], object]] = {}
    predicted: dict[str, float] = {}
    infeasible: list[dict[str, Any]] = []
    with torch.inference_mode(), ExitStack() as attached:
        sides["plain"] = reader(plain, shape, encoded)
        for method, budget in cases:
            model, label = twin(plain), f"{name}, {method} at {budget:.0%}"
            try:
                handle = attached.enter_context(duet_vlm.attach(model, method, budget=budget))
            except duet_vlm.BudgetError as error:
                infeasible.append({"name": label, "status": "infeasible", "reason": str(error)})
                continue
            sides[label] = reader(model, shape, encoded)
            sides[label]()
            report = handle.report()
            predicted[label] = report.flops_bound if encoded else report.full.flops / report.observed.flops
        times = paired(sides, options.repeats(pairs), warmup=1)
    rows = [side_by_side(label, shape, times["plain"], times[label], predicted=value) for label, value in predicted.items()]
    return rows + infeasible


def reader(model: nn.Module, shape: Shape, encoded: bool) -> Callable[[], object]:
    inputs, image = prompt(shape), picture(shape)
    if not encoded:
        return lambda: model(**inputs, **image, logits_to_keep=1)
    output = model.get_image_features(**image)
    return lambda: model(**inputs, mm_encoder_outputs={"image": output}, logits_to_keep=1)
