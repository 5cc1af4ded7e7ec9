"""V2V part by part: the crops of an image or the frames of a clip as spans of their own, and back."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from duet_vlm.ops.ragged import pack_right, upload
from duet_vlm.planning.budget import SpanPlan
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.runtime.validation import check_selection


def select_each(reducer: EncoderReducer, view: EncoderView, parts: list[Tensor]) -> tuple[Selection, Tensor]:
    """What ``reducer`` selects when it sees every part by itself, and the code of what is wrong with it.

    ``parts`` are the part numbers of each span's rows on the host, as ``view.parts``; the plans of reduced spans say what each part keeps.
    """
    table, plans = _table(view.plans, parts)
    device = view.valid.device
    rows = upload(pad_sequence(table, batch_first=True, padding_value=-1), device)  # [B * P, M] rows of each part within its span
    real, index = rows >= 0, rows.clamp(min=0)
    count = len(table) // len(parts)
    span = torch.arange(len(index), device=device)[:, None] // count

    def of_parts(x: Tensor) -> Tensor:
        return x[span.expand_as(index), index]  # no span is repeated for its parts, of which a clip has many

    found = view.select_rows(of_parts, lambda x: x.repeat_interleave(count, 0))
    pieces = dataclasses.replace(
        found,
        valid=real & found.valid,  # what a reduced tower left
        dominant=upload([plan.dominant for plan in plans], device),
        contextual=upload([plan.contextual for plan in plans], device),
        plans=plans,
        parts=torch.where(real, 0, -1),
        crop_grid=None if found.crop_grid is None else torch.zeros_like(found.crop_grid),  # a part is no mosaic
    )
    selection, wrong = check_selection(reducer, reducer.select_tokens(pieces), pieces, plans)
    return _joined(selection, index, count), wrong


def _table(plans: tuple[SpanPlan, ...], parts: list[Tensor]) -> tuple[list[Tensor], tuple[SpanPlan, ...]]:
    """Rows and plan of every part, spans filled up to the same number of parts; a span that is not reduced is one part."""
    most = max(len(plan.parts) or 1 for plan in plans)
    table: list[Tensor] = []
    small: list[SpanPlan] = []
    for plan, numbers in zip(plans, parts, strict=True):
        counts = plan.parts or ((plan.dominant, plan.contextual),)
        rows = numbers.numpy()
        found = [np.flatnonzero(rows == part) for part in range(len(counts))] if plan.parts else [np.arange(len(rows))]
        empty = most - len(found)
        table += [torch.from_numpy(part) for part in found] + [torch.zeros(0, dtype=torch.long, device="cpu")] * empty
        small += [SpanPlan(len(part), *pair, ()) for part, pair in zip(found, counts, strict=True)] + [SpanPlan(0, 0, 0, ())] * empty
    return table, tuple(small)


def _joined(selection: Selection, rows: Tensor, count: int) -> Selection:
    """Selections of [B * P] parts as those of B spans; ``rows`` [B * P, M] are the parts' rows within their spans."""
    width = selection.index.shape[1]
    shift = torch.arange(len(rows), device=rows.device)[:, None] % count * width
    into = torch.where(selection.target_row >= 0, selection.target_row + shift, -1)

    def of_spans(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, count)).flatten(1, 2)

    index, members = rows.gather(1, selection.index), rows.gather(1, selection.source_tokens)
    weights, notes, made = (None if x is None else of_spans(x) for x in (selection.weights, selection.tags, selection.custom_rows))
    return Selection(of_spans(index), of_spans(selection.valid), of_spans(members), of_spans(into), selection.merge, weights, notes, made)


def with_structure(selection: Selection, structure: Tensor, plans: tuple[SpanPlan, ...]) -> Selection:
    """The selection and behind it the structure rows [B, N] of the spans whose plans keep them."""
    kept = structure & upload([plan.structure > 0 for plan in plans], structure.device)[:, None]
    index, valid = pack_right(kept, max(plan.structure for plan in plans))
    notes = None if selection.tags is None else torch.nn.functional.pad(selection.tags, (0, index.shape[1]))
    return dataclasses.replace(selection, index=torch.cat([selection.index, index], 1), valid=torch.cat([selection.valid, valid], 1), tags=notes)
