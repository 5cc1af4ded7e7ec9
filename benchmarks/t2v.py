"""T2V: one rank-and-drop stage over one decoder layer at the same length, both read off the same prefill.

Clocks stand before and after the handle's hook on the stage's layer, and around the full-length layers in front of it, so a prefill
gives one pair: the stage and the median of those layers. The share of the key projection is read in the same way.

The hook makes the keys of all rows. As training and compiled layers have it, the layer then makes its own again: the first row of each shape,
the hook's whole time. Else the layer takes over those of the rows that are left: the second row, which takes off what the next layers, of the
same length, need for their keys and adds what the stage's layer still needed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Options, side_by_side
from shapes import LLAVA, LLAVA_NARROW, QWEN, TINY, TINY_QWEN, WIDE, Shape, build, picture, prompt
from torch import nn

import duet_vlm
from duet_vlm.measure.speed import Timing

ABOVE_KEYS = 0.03  # of a layer, that a stage may cost beside keys that are made twice; else it must stay below what keys cost


def run(options: Options) -> list[dict[str, Any]]:
    cases = [("stage, MLP 3072", LLAVA, 21), ("stage, MLP 2048", LLAVA_NARROW, 21), ("stage, grouped heads", QWEN, 21), ("stage, 4096 wide", WIDE, 9)]
    if options.quick:
        cases = [("stage", TINY, 3), ("stage, grouped heads", TINY_QWEN, 3)]
    return [row for case in cases for row in _stage(options, *case)]


def _stage(options: Options, name: str, shape: Shape, pairs: int) -> list[dict[str, Any]]:
    model, inputs, stage = build(shape), prompt(shape), shape.layers // 2
    layers = model.model.language_model.layers
    with torch.inference_mode(), Clocks() as clocks:
        encoded = model.get_image_features(**picture(shape))
        clocks.before(layers[stage], "stage starts")
        with duet_vlm.attach(model, "duet", schedule=((stage, 0.5),)):
            clocks.before(layers[stage], "stage ends")
            for index in range(1, shape.layers):
                clocks.around(layers[index].self_attn.k_proj, f"keys {index}")
            for index in range(1, stage):
                clocks.around(layers[index], f"layer {index}")
            grid = {k: v for k, v in picture(shape).items() if k == "image_grid_thw"}
            for turn in range(options.repeats(pairs) + 2):
                clocks.turn(keep=turn >= 2)
                model(**inputs, **grid, mm_encoder_outputs={"image": encoded}, logits_to_keep=1)
    layer = clocks.medians([f"layer {index}" for index in range(1, stage)])
    keys = clocks.medians([f"keys {index}" for index in range(1, stage)])
    share = statistics.median(a / b for a, b in zip(keys, layer, strict=True))
    again = clocks.between("stage starts", "stage ends")
    own = clocks.between(f"keys {stage} starts", f"keys {stage} ends")  # of the layer's own pass, after the hook's
    later = clocks.medians([f"keys {index}" for index in range(stage + 1, shape.layers)])
    once = [hook + mine - usual for hook, mine, usual in zip(again, own, later, strict=True)]
    sides = {"keys made again": (again, share + ABOVE_KEYS), "keys made once": (once, share)}
    return [
        side_by_side(f"{name}, {how}", shape, Timing(tuple(taken)), Timing(tuple(layer)), target, key_projection_share=share)
        for how, (taken, target) in sides.items()
    ]


class Clocks:
    """Hooks that note the time; they read nothing and change nothing, and are gone at the end."""

    def __init__(self) -> None:
        self.turns: list[dict[str, float]] = []
        self.now: dict[str, float] = {}
        self.hooks: list[Any] = []

    def __enter__(self) -> Clocks:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def turn(self, keep: bool) -> None:
        self.now = {}
        if keep:
            self.turns.append(self.now)

    def before(self, module: nn.Module, name: str) -> None:
        self.hooks.append(module.register_forward_pre_hook(self._note(name)))

    def around(self, module: nn.Module, name: str) -> None:
        self.before(module, name + " starts")
        self.hooks.append(module.register_forward_hook(self._note(name + " ends")))

    def between(self, start: str, end: str) -> list[float]:
        return [turn[end] - turn[start] for turn in self.turns]

    def medians(self, names: list[str]) -> list[float]:
        """Per turn, the median over ``names`` of the time around each."""
        return [statistics.median(values) for values in zip(*(self.between(n + " starts", n + " ends") for n in names), strict=True)]

    def _note(self, name: str) -> Callable[..., None]:
        def note(*ignored: Any) -> None:
            self.now[name] = time.perf_counter()

        return note
