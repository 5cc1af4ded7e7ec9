"""T2V: one rank-and-drop stage, held against a decoder layer in front of it; everything is read off the same prefill.

Clocks stand in front of and behind the handle's hook on the stage's layer, and around every layer, its norm and its key
projection. The unit is the median of the layers in front, which read all rows. Prefills take turns:

1. The layer makes its norm and keys again, as in training and in compiled layers: the stage is the hook's whole time.
2. The layer takes them over for the rows that are left: the stage is that, less what the next layers need for theirs,
   and more what the stage's layer still needed.
3. Nothing is dropped and nothing of ours runs but the arithmetic of a stage, written down without any bookkeeping, in
   front of the same layer: what stock tensor operations need for it on this machine. The target is that and a little.

``whole`` is read in another way: hook and layer together, less the next layers. It also sees what a hook leaves cold or
warm for its layer, and all the unrest of a whole layer.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest import mock

import torch
from common import Options, side_by_side
from shapes import LLAVA, LLAVA_NARROW, QWEN, TINY, TINY_QWEN, WIDE, Shape, build, picture, prompt
from torch import Tensor, nn

import duet_vlm
from duet_vlm.profiling.timing import PairedTiming, ratio
from duet_vlm.runtime.prefill.layers import PrefillPass

ABOVE_ARITHMETIC = 0.02  # of a layer, that a stage may cost beside its arithmetic in the same prefills
AGAIN, ONCE, BARE = "keys made again", "keys made once", "bare"


def run(options: Options) -> list[dict[str, Any]]:
    cases = [
        ("stage, MLP 3072", LLAVA, 31),
        ("stage, MLP 2048", LLAVA_NARROW, 31),
        ("stage, grouped heads", QWEN, 31),
        ("stage, 4096 wide", WIDE, 9),
    ]
    if options.quick:
        cases = [("stage", TINY, 3), ("stage, grouped heads", TINY_QWEN, 3)]
    return [row for case in cases for row in _stage(options, *case)]


def _stage(options: Options, name: str, shape: Shape, pairs: int) -> list[dict[str, Any]]:
    clocks, stage = _clocked(options, shape, pairs), shape.layers // 2
    before, behind = range(1, stage), range(stage + 1, shape.layers)
    rows = []
    for how in (AGAIN, ONCE):
        full, keys = clocks.medians(how, "layer", before), clocks.medians(how, "keys", before)
        share = statistics.median(a / b for a, b in zip(keys, full, strict=True))
        usual = _sum(clocks.medians(how, "norm", behind), clocks.medians(how, "keys", behind))
        own = _sum(clocks.around(how, f"norm {stage}"), clocks.around(how, f"keys {stage}"))
        taken = clocks.between(how, "stage starts", "ranked")
        alone = clocks.between(BARE, "stage starts", "dropped" if how == AGAIN else "ranked")
        if how == ONCE:
            taken, alone = _difference(taken, _difference(usual, own)), _difference(alone, usual)
        whole = _difference(
            clocks.between(how, "stage starts", f"layer {stage} ends"), clocks.medians(how, "layer", behind)
        )
        arithmetic = _of(alone, clocks.medians(BARE, "layer", before))
        extra = {"key_projection_share": share, "arithmetic": arithmetic, "whole": _of(whole, full)}
        target = arithmetic["median"] + ABOVE_ARITHMETIC
        rows.append(
            side_by_side(
                f"{name}, {how}", shape, PairedTiming(tuple(taken)), PairedTiming(tuple(full)), target, **extra
            )
        )
    return rows


def _of(taken: list[float], unit: list[float]) -> dict[str, Any]:
    found = ratio(PairedTiming(tuple(taken)), PairedTiming(tuple(unit)))
    return {"median": found.median, "interval": [found.low, found.high]}


def _sum(a: list[float], b: list[float]) -> list[float]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _difference(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _clocked(options: Options, shape: Shape, pairs: int) -> Clocks:
    """The clocks of all prefills."""
    model, inputs, stage = build(shape), prompt(shape), shape.layers // 2
    layers = model.model.language_model.layers
    grid = {k: v for k, v in picture(shape).items() if k == "image_grid_thw"}
    with torch.inference_mode(), Clocks() as clocks:
        arithmetic = Arithmetic(shape, inputs["input_ids"].shape[1], clocks.note("dropped"))
        encoded = model.get_image_features(**picture(shape))
        clocks.before(layers[stage], "stage starts")
        clocks.hooks.append(layers[stage].register_forward_pre_hook(arithmetic, with_kwargs=True))
        with duet_vlm.attach(model, "duet", schedule=((stage, 0.5),)) as handle:
            clocks.before(layers[stage], "ranked")
            for index in range(1, shape.layers):
                clocks.watch(layers[index], f"layer {index}")
                clocks.watch(layers[index].input_layernorm, f"norm {index}")
                clocks.watch(layers[index].self_attn.k_proj, f"keys {index}")
            for turn in range(options.repeats(pairs) + 2):
                for how in (AGAIN, ONCE, BARE):
                    clocks.turn(how, keep=turn >= 2)
                    arithmetic.on = how == BARE
                    again = (
                        mock.patch.object(PrefillPass, "reuses", lambda *_: False)
                        if how == AGAIN
                        else contextlib.nullcontext()
                    )
                    with again, handle.paused() if how == BARE else contextlib.nullcontext():
                        model(**inputs, **grid, mm_encoder_outputs={"image": encoded}, logits_to_keep=1)
    return clocks


class Arithmetic:
    """Norm, keys of all rows, queries of the text rows, rotation, scores, choice and the gathering of survivors, for
    one known prompt: image first, text behind it. What it makes is thrown away. ``dropped`` is called before norm and
    keys are gathered for the layer to take over."""

    def __init__(self, shape: Shape, rows: int, dropped: Callable[[], None]) -> None:
        self.dropped = dropped
        self.on, self.shape, self.width = False, shape, shape.hidden // shape.heads
        self.first = rows - shape.text - shape.visual_tokens
        self.asking = torch.arange(rows - shape.text, rows)
        hidden = torch.arange(rows) > self.asking[:, None]
        lowest = torch.finfo(torch.float32).min
        self.bias = (hidden * lowest).repeat(shape.heads // shape.kv_heads, 1).expand(shape.kv_heads, -1, -1)
        self.share = torch.full((1, shape.heads * shape.text), 1 / (shape.heads * shape.text))

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.on:
            return
        hidden, tables = args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"]
        attention, visual = layer.self_attn, self.shape.visual_tokens
        normed = layer.input_layernorm(hidden)
        keys = attention.k_proj(normed)
        key = self._rotated(keys, tables)
        query = self._rotated(attention.q_proj(normed[:, self.asking]), [table[:, self.asking] for table in tables])
        grouped = query.reshape(self.shape.kv_heads, -1, self.width)
        scores = self.share @ torch.baddbmm(self.bias, grouped, key.transpose(1, 2), alpha=self.width**-0.5).softmax(
            -1
        ).flatten(0, 1)
        best = scores[0, self.first : self.first + visual].topk(visual // 2).indices.sort().values + self.first
        rows = torch.cat([torch.arange(self.first), best, self.asking])
        hidden[0].index_select(0, rows)
        self.dropped()
        for made in (normed, keys):
            made[0].index_select(0, rows)

    def _rotated(self, projected: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """[1, n, H * d] -> [H, n, d]."""
        x = projected.unflatten(-1, (-1, self.width))
        cos, sin = (table[:, :, None] for table in tables)
        turned = x * cos
        (low, high), (a, b), (of_a, of_b) = (t.chunk(2, -1) for t in (turned, x, sin))
        low.addcmul_(b, of_a, value=-1)
        high.addcmul_(a, of_b)
        return turned[0].transpose(0, 1)


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
        self.hooks.append(module.register_forward_pre_hook(self.note(name)))

    def watch(self, module: nn.Module, name: str) -> None:
        """Its last run in a prefill: a ranking layer's own."""
        self.before(module, name + " starts")
        self.hooks.append(module.register_forward_hook(self.note(name + " ends")))

    def between(self, how: str, start: str, end: str) -> list[float]:
        return [turn[end] - turn[start] for turn in self.turns[how]]

    def around(self, how: str, name: str) -> list[float]:
        return self.between(how, name + " starts", name + " ends")

    def medians(self, how: str, name: str, layers: Iterable[int]) -> list[float]:
        """Per turn, the median over ``layers`` of the time around each."""
        return [
            statistics.median(values)
            for values in zip(*(self.around(how, f"{name} {index}") for index in layers), strict=True)
        ]

    def note(self, name: str) -> Callable[..., None]:
        def note(*ignored: Any) -> None:
            self.now[name] = time.perf_counter()

        return note
