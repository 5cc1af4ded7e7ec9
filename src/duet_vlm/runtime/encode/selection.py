"""What one call of a vision tower becomes: a plan for each span, what is recorded to rank by, which rows stay. Needs no model; servers choose
by it, too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from duet_vlm.models.adapter import RecordedQK
from duet_vlm.ops.ragged import upload
from duet_vlm.ops.score import one_head
from duet_vlm.planning.budget import SpanPlan
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.encoder_view import LayerView
from duet_vlm.runtime.encode.per_crop import select_each, with_structure
from duet_vlm.runtime.validation import check_selection

STRUCTURE, PADDING = -1, -2  # in place of the number of a part


def reduces_per_crop(reducer: Reducer, usual: bool) -> bool:
    """Whether V2V looks at the parts of a span one by one, where a family ``usual``ly does so or not."""
    if not isinstance(reducer, EncoderReducer) or reducer.crops == "joint":
        return False
    return reducer.crops == "per_crop" or (usual and not reducer.compares_frames)


def plan_spans(
    span: Callable[..., SpanPlan], parts: Sequence[Tensor], each: bool, left: Sequence[Sequence[int] | None] | None = None, fed: int = 0
) -> tuple[SpanPlan, ...]:
    """The plan of each span, made by ``span`` (``Rules.span``) from the sizes of its parts and its structure rows: ``parts`` on the host, as
    ``Adapter.parts``. ``left``: how many tokens of each part a threshold in the tower left; ``fed``: rows of each part that are no patches."""
    return tuple(span(*part_sizes(rows), each, some, fed) for rows, some in zip(parts, left or [None] * len(parts), strict=True))


def part_sizes(parts: Tensor) -> tuple[tuple[int, ...], int]:
    """Of one span: how many rows show each part, and how many are structure."""
    structure, *sizes = np.bincount(parts.numpy() + 1, minlength=1).tolist()  # numpy: on the host already, nothing waits
    return tuple(sizes), structure


def max_parts_of(parts: Sequence[Tensor]) -> tuple[int, int]:
    """The most parts of a span, and the most rows of a part; padding in front of a span, -2, is none."""
    sizes = [part_sizes(rows.clamp(min=STRUCTURE))[0] for rows in parts]
    return max(map(len, sizes)), max((n for span in sizes for n in span), default=0)


def record_qk(reducer: Reducer, query: Tensor, key: Tensor, scaling: float, segments: Tensor | None) -> RecordedQK:
    """One call of the attention that ranks, as the method's settings read it: query, key [B, H, N, d] of all heads."""
    query, key = query.detach(), key.detach()
    if reducer.scoring_rules().signal_heads == "one":
        query, key, scaling = one_head(query, key, scaling)
    return RecordedQK(query, key, scaling, segments, reducer.signal_queries)


def select_tokens(
    reducer: EncoderReducer,
    plans: Sequence[SpanPlan],
    parts: Sequence[Tensor],
    layers: tuple[LayerView, ...],
    features: Tensor | None,
    *,
    stream: str = "image",
    each: bool = False,
    left: Tensor | None = None,
    read: Mapping[str, Any] | None = None,
) -> tuple[Selection, Tensor, Tensor]:
    """Which rows of B spans of up to N tokens stay.

    Parameters
    ----------
    plans : sequence of SpanPlan
        Of each span; at least one of them reduces.
    parts : sequence of Tensor
        Per span, on the host: the part (crop, frame) that each of its rows shows [n], -1 for structure rows.
    layers : tuple of LayerView
        The vision layers that the method names.
    features : Tensor or None
        [B, N, C] as far as the method asks for them; one tensor of either is there.
    each : bool
        Parts are looked at one by one.
    left : Tensor or None
        [B, N] bool, on their device: the rows that went through a reduced tower.
    read : mapping
        What else the method reads, by its name in ``EncoderView``.

    Returns
    -------
    selection, code, content : Selection, Tensor, Tensor
        The code of what is wrong with it (``flow.verify``); [B, N] bool, the rows that could be chosen.
    """
    device = next(x.device for x in (*(x for layer in layers for x in layer.tensors()), features) if x is not None)
    numbers = upload(pad_sequence(list(parts), batch_first=True, padding_value=PADDING), device)
    whole = upload([not plan.merges for plan in plans], device)
    structure = numbers == STRUCTURE  # of reduced spans such rows leave, or are kept, without being ranked
    content = (numbers >= 0) | (structure & whole[:, None])
    if left is not None:
        content = content & (structure | left)
    asked = tuple(dataclasses.replace(p, dominant=p.dominant - p.structure, structure=0) for p in plans)
    planned = upload([[p.dominant, p.contextual] for p in asked], device)
    if features is not None and reducer.trained_reducer is None:
        features = features.detach()
    view = EncoderView(
        content, planned[:, 0], planned[:, 1], asked, layers[0].importance if layers else None, layers[0].keys if layers else None,
        features, numbers.clamp(min=STRUCTURE), stream, layers, max_parts=max_parts_of(parts), method=reducer.name, **read or {},
    )  # fmt: skip
    if each and any(plan.parts for plan in plans):
        selection, wrong = select_each(reducer, view, list(parts))
    else:
        selection, wrong = check_selection(reducer, reducer.select_tokens(view), view, view.plans)
    return with_structure(selection, structure, tuple(plans)) if any(plan.structure for plan in plans) else selection, wrong, content


def slots_of(selection: Selection, reducer: Reducer) -> Tensor:
    """Slot within the span for each output row [B, K]: its own (keep) or the first ones in the method's order (compact)."""
    if reducer.positions == "keep":
        return selection.index
    return torch.where(selection.valid, selection.valid.cumsum(1) - 1, 0)
