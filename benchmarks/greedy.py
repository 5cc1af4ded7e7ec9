"""Greedy choice of tokens: what V2V does after the signals are read (choose, merge) over the full prefill that it
replaces.

The signals are random, at the sizes of the shape's tower; what is chosen does not change how long choosing takes. The
full prefill is the decoder's alone, from an encoded image, which is the harder denominator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import Options, side_by_side
from prefill import reader
from shapes import LLAVA, TINY, Shape, build
from torch import Tensor

import duet_vlm
from duet_vlm.ops.merge import merged_rows
from duet_vlm.profiling.timing import time_paired

TARGET, AT_ONCE = 0.03, 0.01  # greedy choices; those of one look
PICKS = (1, 2, 4, 8)
BUDGETS = (0.33, 0.22, 0.11, 0.05)


def run(options: Options) -> list[dict[str, Any]]:
    shape = TINY if options.quick else LLAVA
    cases: list[tuple[str, float, dict[str, Any]]] = [("scope", 0.11, {"picks": picks}) for picks in PICKS]
    cases += [("duet_plus", budget, {}) for budget in BUDGETS]
    cases += [("divprune", 0.11, {}), ("duet", 0.11, {})]
    with torch.inference_mode():
        sides: dict[str, Callable[[], object]] = {"prefill": reader(build(shape), shape, encoded=True)}
        for method, budget, fields in cases:
            extra = "".join(f", {name}={value}" for name, value in fields.items())
            sides[f"choice, {method} at {budget:.0%}{extra}"] = _choice(shape, method, budget, fields)
        times = time_paired(sides, options.repeats(9), warmup=1)
    targets = {name: AT_ONCE if "duet at" in name else TARGET for name in sides if name != "prefill"}
    return [side_by_side(name, shape, times[name], times["prefill"], target) for name, target in targets.items()]


def _choice(shape: Shape, method: str, budget: float, fields: dict[str, Any]) -> Callable[[], Tensor]:
    """Choose and merge for one image."""
    reducer = duet_vlm.make_method(method, **fields)
    assert isinstance(reducer, duet_vlm.EncoderReducer)
    plan = reducer.plan(shape.visual_tokens, shape.layers, budget)
    draw = torch.Generator().manual_seed(3)
    keys, features = (
        torch.randn(1, plan.tokens, width, generator=draw)
        for width in (min(64, shape.vision_hidden), shape.vision_hidden)
    )
    view = duet_vlm.EncoderView(
        valid=torch.ones(1, plan.tokens, dtype=torch.bool), dominant=torch.tensor([plan.dominant]), contextual=torch.tensor([plan.contextual]),
        plans=(plan,), importance=torch.rand(1, plan.tokens, generator=draw), keys=keys, features=features,
    )  # fmt: skip
    return lambda: merged_rows(features, reducer.select_tokens(view))
