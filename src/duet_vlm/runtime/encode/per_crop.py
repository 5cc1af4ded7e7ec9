"""Reduce part by part: the crops of an image or the frames of a video as spans of their own, and back."""

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


def select_per_crop(reducer: EncoderReducer, view: EncoderView, parts: list[Tensor]) -> tuple[Selection, Tensor]:
    """The selection of ``reducer`` in every part independently, and the code of what is wrong with it.

    ``parts`` are the part numbers of each span's rows on the host, as ``view.parts``; the plans of reduced spans hold
    the counts of each part.
    """
    rows_of_parts, plans = _rows_and_plans(view.plans, parts)
    device = view.valid.device
    # [B * P, M] rows of each part within its span
    rows = upload(pad_sequence(rows_of_parts, batch_first=True, padding_value=-1), device)
    valid, index = rows >= 0, rows.clamp(min=0)
    num_parts = len(rows_of_parts) // len(parts)
    span_of_part = torch.arange(len(index), device=device)[:, None] // num_parts

    def of_parts(x: Tensor) -> Tensor:
        # spans are not repeated for their parts, of which a video has many
        return x[span_of_part.expand_as(index), index]

    gathered = view.select_rows(of_parts, lambda x: x.repeat_interleave(num_parts, 0))
    part_view = dataclasses.replace(
        gathered,
        valid=valid & gathered.valid,  # tokens that went through a reduced tower
        dominant=upload([plan.dominant for plan in plans], device),
        contextual=upload([plan.contextual for plan in plans], device),
        plans=plans,
        parts=torch.where(valid, 0, -1),
        crop_grid=None if gathered.crop_grid is None else torch.zeros_like(gathered.crop_grid),  # a part is no mosaic
    )
    selection, invalid_code = check_selection(reducer, reducer.select_tokens(part_view), part_view, plans)
    return _join_parts(selection, index, num_parts), invalid_code


def _rows_and_plans(plans: tuple[SpanPlan, ...], parts: list[Tensor]) -> tuple[list[Tensor], tuple[SpanPlan, ...]]:
    """Rows and plan of every part, padded to the same number of parts per span; an unreduced span is one part."""
    num_parts = max(len(plan.parts) or 1 for plan in plans)
    rows_of_parts: list[Tensor] = []
    plans_of_parts: list[SpanPlan] = []
    for plan, numbers in zip(plans, parts, strict=True):
        counts = plan.parts or ((plan.dominant, plan.contextual),)
        rows = numbers.numpy()
        part_rows = (
            [np.flatnonzero(rows == part) for part in range(len(counts))] if plan.parts else [np.arange(len(rows))]
        )
        missing = num_parts - len(part_rows)
        rows_of_parts += [torch.from_numpy(part) for part in part_rows] + [
            torch.zeros(0, dtype=torch.long, device="cpu")
        ] * missing
        for part, (dominant, contextual) in zip(part_rows, counts, strict=True):
            plans_of_parts.append(SpanPlan(len(part), dominant, contextual, ()))
        plans_of_parts += [SpanPlan(0, 0, 0, ())] * missing
    return rows_of_parts, tuple(plans_of_parts)


def _join_parts(selection: Selection, rows_of_parts: Tensor, num_parts: int) -> Selection:
    """Selections of [B * P] parts as those of B spans; ``rows_of_parts`` [B * P, M] are their rows within their spans."""
    width = selection.index.shape[1]
    offset = torch.arange(len(rows_of_parts), device=rows_of_parts.device)[:, None] % num_parts * width
    target_row = torch.where(selection.target_row >= 0, selection.target_row + offset, -1)

    def of_spans(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, num_parts)).flatten(1, 2)

    index, source_tokens = rows_of_parts.gather(1, selection.index), rows_of_parts.gather(1, selection.source_tokens)
    weights, tags, custom_rows = (
        None if x is None else of_spans(x) for x in (selection.weights, selection.tags, selection.custom_rows)
    )
    return Selection(
        of_spans(index),
        of_spans(selection.valid),
        of_spans(source_tokens),
        of_spans(target_row),
        merge=selection.merge,
        weights=weights,
        tags=tags,
        custom_rows=custom_rows,
    )


def with_structure(selection: Selection, structure: Tensor, plans: tuple[SpanPlan, ...]) -> Selection:
    """The selection, and after it the structure rows [B, N] of the spans whose plans keep them."""
    kept = structure & upload([plan.structure > 0 for plan in plans], structure.device)[:, None]
    index, valid = pack_right(kept, max(plan.structure for plan in plans))
    tags = None if selection.tags is None else torch.nn.functional.pad(selection.tags, (0, index.shape[1]))
    return dataclasses.replace(
        selection, index=torch.cat([selection.index, index], 1), valid=torch.cat([selection.valid, valid], 1), tags=tags
    )
