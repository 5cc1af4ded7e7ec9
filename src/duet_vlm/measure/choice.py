"""What choosing and merging cost: the method's own code, run on shapes without data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from duet_vlm.budget import SpanPlan, Stages
from duet_vlm.measure.flops import Grid, asking_rows, signal_flops, tower_rows
from duet_vlm.measure.shapes import VisionShape
from duet_vlm.reducer import EncoderReducer, Reducer, VisionView
from duet_vlm.tower import TowerReducer


def selection_flops(
    reducer: Reducer, plans: Sequence[SpanPlan], passes: Sequence[Sequence[int]], vision: VisionShape, key_width: int, feature_width: int
) -> int:
    """Signals, choice and merge before the decoder for the spans of one call; 0 where the method leaves them whole.

    Parameters
    ----------
    passes : sequence of sequence of int
        Per span, visual tokens of each part that the tower looks at by itself.
    key_width, feature_width : int
        Width of one head of the tower, and of the rows that are reduced.
    """
    if not isinstance(reducer, EncoderReducer) or not any(plan.merges for plan in plans):
        return 0
    parts = [tokens for span in passes for tokens in span]
    signals = 0
    if reducer.signals:
        signals = sum(signal_flops(vision, n, reducer.signal_queries) for n in (parts if reducer.signal_segments else [sum(parts)]))
    keys = vision.width if reducer.signal_heads == "one" else key_width
    return signals + choice_flops(reducer, tuple(_taken_apart(plans, passes)), keys, feature_width)


def tower_choice_flops(reducer: Reducer, parts: Sequence[tuple[int, Grid, Stages]], vision: VisionShape, key_width: int) -> int:
    """Finding out who is like whom in the tower, and its attention where it ranks units: ``parts`` as ``Sample.in_tower`` lists them."""
    tower, total = getattr(reducer, "tower", None), 0
    if not isinstance(tower, TowerReducer):
        return 0
    for tokens, _, stages in parts:
        for after, left in stages:
            total += 2 * tower.pairs(tokens, left) * (key_width if after else vision.width)
            if "attention" in tower.tower_signals:
                total += signal_flops(vision, tokens, tower.signal_queries)
            tokens = left
    return total


def selection_bytes(reducer: Reducer, plans: Sequence[SpanPlan], passes: Sequence[Sequence[int]], vision: VisionShape, key_width: int) -> int:
    """What the softmax of the signals reads and writes, in float32: every head's scores some four times."""
    if not isinstance(reducer, EncoderReducer) or not reducer.signals or not any(plan.merges for plan in plans):
        return 0
    rows = [tower_rows(vision, n) for span in passes for n in span]
    heads = 1 if reducer.signal_heads == "one" else vision.width // key_width
    return sum(16 * heads * asking_rows(vision, n, reducer.signal_queries) * n for n in rows)


def _taken_apart(plans: Sequence[SpanPlan], passes: Sequence[Sequence[int]]) -> list[SpanPlan]:
    """One plan for every part that is reduced by itself; all spans of a call are padded to equally many."""
    parts = [plan.parts for plan in plans]
    most = max(map(len, parts), default=0)
    if most == 0:
        return list(plans)
    small = []
    for plan, counts, sizes in zip(plans, parts, passes, strict=True):
        own = [SpanPlan(size, kept, merged, ()) for size, (kept, merged) in zip(sizes, counts, strict=False)]
        own = own or [SpanPlan(plan.tokens, plan.dominant, plan.contextual, ())]
        small += own + [SpanPlan(0, 0, 0, ())] * (most - len(own))
    return small


@lru_cache(maxsize=256)
def choice_flops(reducer: EncoderReducer, plans: tuple[SpanPlan, ...], key_width: int, feature_width: int) -> int:
    """Matrix products of choosing and merging on spans with these plans, counted on the meta device."""
    batch, tokens = len(plans), max(plan.tokens for plan in plans)
    with torch.no_grad(), torch.device("meta") as meta, FlopCounterMode(display=False) as counter:
        count = torch.empty(batch, dtype=torch.long, device=meta)
        selection = reducer.v2v(
            VisionView(
                valid=torch.empty(batch, tokens, dtype=torch.bool, device=meta), dominant=count, contextual=count, plans=plans,
                importance=torch.empty(batch, tokens, device=meta), keys=torch.empty(batch, tokens, key_width, device=meta),
                features=torch.empty(batch, tokens, feature_width, device=meta),
            )
        )  # fmt: skip
    merging = 0 if selection.weights is None else 2 * selection.index.numel() * tokens * feature_width  # a table of rows by tokens
    return counter.get_total_flops() + merging
