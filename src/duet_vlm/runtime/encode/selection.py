"""Select the tokens of an encoder call: a plan for each span, recorded queries and keys, the kept tokens.

Needs no model, so that serving uses it, too.
"""

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
from duet_vlm.runtime.encode.per_crop import select_per_crop, with_structure
from duet_vlm.runtime.validation import check_selection

STRUCTURE, PADDING = -1, -2  # instead of the number of a part


def reduces_per_crop(reducer: Reducer, family_default: bool) -> bool:
    """True if the encoder stage reduces the parts of a span one by one; ``family_default``: the family's default."""
    if not isinstance(reducer, EncoderReducer) or reducer.options.crops == "joint":
        return False
    return reducer.options.crops == "per_crop" or (family_default and not reducer.compares_frames)


def plan_spans(
    solve: Callable[..., SpanPlan],
    parts: Sequence[Tensor],
    per_crop: bool,
    num_survivors: Sequence[Sequence[int] | None] | None = None,
    num_cls: int = 0,
) -> tuple[SpanPlan, ...]:
    """The plan of each span.

    Parameters
    ----------
    solve : callable
        ``ActiveConfig.plan_span``.
    parts : sequence of Tensor
        Per span, on the host: the part number of each of its rows, as ``Adapter.parts``.
    per_crop : bool
        Parts are reduced one by one.
    num_survivors : sequence, optional
        Per span, how many tokens of each part a threshold in the tower kept.
    num_cls : int
        Rows of each part that are no patches.
    """
    plans = []
    for rows, counts in zip(parts, num_survivors or [None] * len(parts), strict=True):
        sizes, structure = part_sizes(rows)
        plans.append(solve(sizes, structure, per_crop, counts, num_cls))
    return tuple(plans)


def part_sizes(parts: Tensor) -> tuple[tuple[int, ...], int]:
    """Rows of each part of a span, and its structure rows."""
    structure, *sizes = np.bincount(parts.numpy() + 1, minlength=1).tolist()  # numpy: the tensor is on the host
    return tuple(sizes), structure


def max_parts_of(parts: Sequence[Tensor]) -> tuple[int, int]:
    """The largest number of parts of a span, and of rows of a part; padding (-2) is not counted."""
    sizes = [part_sizes(rows.clamp(min=STRUCTURE))[0] for rows in parts]
    return max(map(len, sizes)), max((n for span in sizes for n in span), default=0)


def record_qk(reducer: Reducer, query: Tensor, key: Tensor, scaling: float, segments: Tensor | None) -> RecordedQK:
    """One recorded attention call, as the method's settings want it: query, key [B, H, N, d] of all heads."""
    query, key = query.detach(), key.detach()
    if reducer.scoring_rules().signal_heads == "one":
        query, key, scaling = one_head(query, key, scaling)
    return RecordedQK(query, key, scaling, segments, reducer.options.signal_queries)


def select_tokens(
    reducer: EncoderReducer,
    plans: Sequence[SpanPlan],
    parts: Sequence[Tensor],
    layers: tuple[LayerView, ...],
    features: Tensor | None,
    *,
    modality: str = "image",
    per_crop: bool = False,
    tower_survivors: Tensor | None = None,
    further_inputs: Mapping[str, Any] | None = None,
) -> tuple[Selection, Tensor, Tensor]:
    """Select the tokens that are kept of B spans of up to N tokens.

    Parameters
    ----------
    plans : sequence of SpanPlan
        Per span; at least one of them drops tokens.
    parts : sequence of Tensor
        Per span, on the host: [n] the part (crop, frame) of each of its rows, -1 for structure rows.
    layers : tuple of LayerView
        The signals of each signal layer.
    features : Tensor or None
        [B, N, C] if the method needs them; at least one tensor is given, of signals or features.
    per_crop : bool
        Parts are reduced one by one.
    tower_survivors : Tensor or None
        [B, N] bool, on their device: the tokens that went through a reduced tower.
    further_inputs : mapping
        Further inputs of the method, by their name in ``EncoderView``.

    Returns
    -------
    selection, invalid_code, selectable : Selection, Tensor, Tensor
        The code of what is wrong with it (runtime/validation.py); [B, N] bool, the tokens that could be selected.
    """
    device = next(x.device for x in (*(x for layer in layers for x in layer.tensors()), features) if x is not None)
    part_numbers = upload(pad_sequence(list(parts), batch_first=True, padding_value=PADDING), device)
    keeps_all = upload([not plan.reduces_entry for plan in plans], device)
    structure = part_numbers == STRUCTURE  # of reduced spans such rows are dropped, or kept, without being ranked
    selectable = (part_numbers >= 0) | (structure & keeps_all[:, None])
    if tower_survivors is not None:
        selectable = selectable & (structure | tower_survivors)
    token_plans = tuple(dataclasses.replace(p, dominant=p.dominant - p.structure, structure=0) for p in plans)
    num_tokens = upload([[p.dominant, p.contextual] for p in token_plans], device)
    if features is not None and reducer.trained_reducer is None:
        features = features.detach()
    view = EncoderView(
        selectable,
        num_tokens[:, 0],
        num_tokens[:, 1],
        token_plans,
        importance=layers[0].importance if layers else None,
        keys=layers[0].keys if layers else None,
        features=features,
        parts=part_numbers.clamp(min=STRUCTURE),
        modality=modality,
        layers=layers,
        max_parts=max_parts_of(parts),
        method=reducer.name,
        **further_inputs or {},
    )
    if per_crop and any(plan.parts for plan in plans):
        selection, invalid_code = select_per_crop(reducer, view, list(parts))
    else:
        selection, invalid_code = check_selection(reducer, reducer.select_tokens(view), view, view.plans)
    if any(plan.structure for plan in plans):
        selection = with_structure(selection, structure, tuple(plans))
    return selection, invalid_code, selectable


def slots_of(selection: Selection, reducer: Reducer) -> Tensor:
    """Position within the span of each selected token [B, K]: its own (keep), or the first ones in the method's order
    (compact)."""
    if reducer.options.positions == "keep":
        return selection.index
    return torch.where(selection.valid, selection.valid.cumsum(1) - 1, 0)
