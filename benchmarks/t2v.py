"""T2V: what one rank-and-drop stage adds to a prefill, held against a decoder layer in front of it; everything is read off the same prefill.

Clocks stand in front of the handle's hook on the stage's layer, behind that layer, and around every other one. Hook and layer together, less
what the next layers take for as many rows, is what the stage costs: also what it leaves cold for the layer, and what it spares it. The median
of the layers in front, which read all rows, is the unit; the share of the key projection is read in the same way.

Two prefills make a pair: in the first the layer makes its keys again, as in training and in compiled layers; in the second it takes over those
of the rows that are left.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from common import Options, side_by_side
from shapes import LLAVA, LLAVA_NARROW, QWEN, TINY, TINY_QWEN, WIDE, Shape, build, picture, prompt
from torch import nn

import duet_vlm
from duet_vlm.flow.decoder import PrefillPass
from duet_vlm.measure.speed import Timing

ABOVE_KEYS = 0.03  # of a layer, that a stage may cost beside keys that are made twice; else it must stay below what keys cost
AGAIN, ONCE = "keys made again", "keys made once"


def run(options: Options) -> list[dict[str, Any]]:
    cases = [("stage, MLP 3072", LLAVA, 41), ("stage, MLP 2048", LLAVA_NARROW, 41), ("stage, grouped heads", QWEN, 41), ("stage, 4096 wide", WIDE, 9)]
    if options.quick:
        cases = [("stage", TINY, 3), ("stage, grouped heads", TINY_QWEN, 3)]
    return [row for case in cases for row in _stage(options, *case)]


def _stage(options: Options, name: str, shape: Shape, pairs: int) -> list[dict[str, Any]]:
    model, inputs, stage = build(shape), prompt(shape), shape.layers // 2
    layers = model.model.language_model.layers
    grid = {k: v for k, v in picture(shape).items() if k == "image_grid_thw"}
    with torch.inference_mode(), Clocks() as clocks:
        encoded = model.get_image_features(**picture(shape))
        clocks.before(layers[stage], "stage starts")
        with duet_vlm.attach(model, "duet", schedule=((stage, 0.5),)):
            clocks.before(layers[stage], "ranked")
            clocks.after(layers[stage], "stage ends")
            for index in set(range(1, shape.layers)) - {stage}:
                clocks.around(layers[index], f"layer {index}")
            for index in range(1, stage):
                clocks.around(layers[index].self_attn.k_proj, f"keys {index}")
            for turn in range(options.repeats(pairs) + 2):
                for how in (AGAIN, ONCE):
                    clocks.turn(how, keep=turn >= 2)
                    with mock.patch.object(PrefillPass, "reuses", PrefillPass.reuses if how == ONCE else lambda *_: False):
                        model(**inputs, **grid, mm_encoder_outputs={"image": encoded}, logits_to_keep=1)
    rows = []
    for how in (AGAIN, ONCE):
        full = clocks.medians(how, [f"layer {index}" for index in range(1, stage)])
        fewer = clocks.medians(how, [f"layer {index}" for index in range(stage + 1, shape.layers)])
        keys = clocks.medians(how, [f"keys {index}" for index in range(1, stage)])
        share = statistics.median(a / b for a, b in zip(keys, full, strict=True))
        more = [whole - usual for whole, usual in zip(clocks.between(how, "stage starts", "stage ends"), fewer, strict=True)]
        hook = statistics.median(clocks.between(how, "stage starts", "ranked"))
        target = share + (ABOVE_KEYS if how == AGAIN else 0)
        extra = {"key_projection_share": share, "hook_milliseconds": 1000 * hook}
        rows.append(side_by_side(f"{name}, {how}", shape, Timing(tuple(more)), Timing(tuple(full)), target, **extra))
    return rows


class Clocks:
    """Hooks that note the time; they read nothing and change nothing, and are gone at the end."""

    def __init__(self) -> None:
        self.turns: dict[str, list[dict[str, float]]] = {}
        self.now: dict[str, float] = {}
        self.hooks: list[Any] = []

    def __enter__(self) -> Clocks:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def turn(self, how: str, keep: bool) -> None:
        self.now = {}
        if keep:
            self.turns.setdefault(how, []).append(self.now)

    def before(self, module: nn.Module, name: str) -> None:
        self.hooks.append(module.register_forward_pre_hook(self._note(name)))

    def after(self, module: nn.Module, name: str) -> None:
        self.hooks.append(module.register_forward_hook(self._note(name)))

    def around(self, module: nn.Module, name: str) -> None:
        self.before(module, name + " starts")
        self.after(module, name + " ends")

    def between(self, how: str, start: str, end: str) -> list[float]:
        return [turn[end] - turn[start] for turn in self.turns[how]]

    def medians(self, how: str, names: list[str]) -> list[float]:
        """Per turn, the median over ``names`` of the time around each."""
        return [statistics.median(values) for values in zip(*(self.between(how, n + " starts", n + " ends") for n in names), strict=True)]

    def _note(self, name: str) -> Callable[..., None]:
        def note(*ignored: Any) -> None:
            self.now[name] = time.perf_counter()

        return note
