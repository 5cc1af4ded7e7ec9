"""Prefill: how many times faster the reduced prompt is read, beside what its FLOPs promise. Here ratios are plain over
reduced.

"decoder" starts from an encoded image, as generate() does after its encoder call; "tower and decoder" starts from
pixels. FLOPs promise more than a device keeps where rows are few and products flat. So a third side reads as many rows
in every layer with nothing of ours in between (the prompt's first rows, whatever they show): what this machine makes of
the same rows, and how close we come to it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from common import Options, side_by_side
from shapes import LLAVA, TINY, Shape, build, picture, prompt, twin
from torch import nn
from transformers import DynamicCache

import duet_vlm
from duet_vlm.evaluation.speed.prompts import encode
from duet_vlm.profiling.timing import ratio, time_paired

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
    return _compare(
        options, shape, plain, "tower and decoder", [("duet", budget) for budget in BUDGETS], 7, encoded=False
    )


def _compare(
    options: Options,
    shape: Shape,
    plain: nn.Module,
    name: str,
    cases: list[tuple[str, float]],
    pairs: int,
    encoded: bool,
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
            if encoded:
                text = prompt(shape)["input_ids"].shape[1] - shape.visual_tokens
                sides[f"{label}, bare"] = bare_reader(plain, shape, [text + round(count) for count in report.measured])
        times = time_paired(sides, options.repeats(pairs), warmup=1)
    rows = [
        side_by_side(label, shape, times["plain"], times[label], predicted=value) for label, value in predicted.items()
    ]
    for row in rows:
        if encoded:
            bare = ratio(times["plain"], times[f"{row['name']}, bare"])
            row["same_rows"] = {"median": bare.median, "interval": [bare.low, bare.high]}
    return rows + infeasible


def bare_reader(model: nn.Module, shape: Shape, rows: list[int]) -> Callable[[], object]:
    """The model's own layers over the first ``rows[l]`` rows of the prompt, and its head over the last of them."""
    stack = model.model.language_model
    embeds = stack.embed_tokens(prompt(shape)["input_ids"].clamp(max=shape.vocab - 1))
    positions = torch.arange(embeds.shape[1])[None]

    def read() -> object:
        hidden, cache = embeds[:, : rows[0]], DynamicCache(config=model.config.text_config)
        rotary = stack.rotary_emb(hidden, positions[:, : rows[0]])
        for layer, count in zip(stack.layers, rows, strict=True):
            hidden, rotary = hidden[:, :count].contiguous(), (rotary[0][:, :count], rotary[1][:, :count])
            hidden = layer(
                hidden, attention_mask=None, position_embeddings=rotary, past_key_values=cache, use_cache=True
            )
        return model.lm_head(stack.norm(hidden)[:, -1:])

    return read


def reader(model: nn.Module, shape: Shape, encoded: bool) -> Callable[[], object]:
    inputs, image = prompt(shape), picture(shape)
    if not encoded:
        return lambda: model(**inputs, **image, logits_to_keep=1)
    outputs = encode(model, image)
    return lambda: model(**inputs, mm_encoder_outputs=outputs, logits_to_keep=1)
