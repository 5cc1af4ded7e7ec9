"""Rows of images or clips, as a tower or projector made them, cut to those that enter the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from duet_vlm.ops.merge import merged_rows
from duet_vlm.ops.ragged import pad_rows
from duet_vlm.reducers.encoder_view import LayerView
from duet_vlm.reducers.inputs import VISION_LAYER_INPUTS
from duet_vlm.runtime.encode.selection import part_sizes, select_tokens
from duet_vlm.runtime.validation import raise_if_invalid
from duet_vlm.serve.served_method import ServedMethod

TowerSignals = tuple[Sequence[Tensor], Sequence[Tensor]]


def reduce_rows(
    served: ServedMethod,
    rows: Sequence[Tensor],
    parts: Sequence[Tensor],
    requested: Sequence[float],
    signals: TowerSignals | None,
    seen: Sequence[Tensor] | None = None,
    stream: str = "image",
) -> list[tuple[Tensor, Tensor]]:
    """The rows of each image, or of each clip, that enter the decoder.

    Parameters
    ----------
    rows : sequence of Tensor
        Per image [n, C]: what the projector reads, or, for methods that read projected rows and for grid mergers, what
        it made.
    parts : sequence of Tensor
        Per image, on the host: the part (crop, frame) that each row shows [n], -1 for newlines.
    requested : sequence of float
        Per image the budget of its request, as ``Served.asked`` wrote it.
    signals : (sequence, sequence) of Tensor, or None
        Importance [n] and mean keys [n, d] per image, for methods that read them.
    seen : sequence of Tensor, optional
        Per image what the method is shown of its rows [n, c], where that is not all of them.
    stream : str
        "video": they are clips, and their parts are steps of time.

    Returns
    -------
    list of (Tensor, Tensor)
        Per image the rows [K, C], as many as planned, and the token that each stands for [K]: in the method's order
        where positions are compact, ascending where they are kept.
    """
    plans = [served.span(*part_sizes(shown), wanted) for shown, wanted in zip(parts, requested, strict=True)]
    if not any(plan.reduces_entry for plan in plans):
        return [(row, torch.arange(len(row), device=row.device)) for row in rows]
    reducer = served.reducer
    features, _ = pad_rows(list(rows))
    layers: tuple[LayerView, ...] = ()
    if reducer.requires & VISION_LAYER_INPUTS:
        if signals is None:
            raise RuntimeError(f"{reducer.name} ranks by the attention of the vision tower, and none was recorded")
        layers = (LayerView(pad_rows(list(signals[0]))[0], keys=pad_rows(list(signals[1]))[0]),)
    with torch.no_grad():
        shown = features if seen is None else pad_rows(list(seen))[0]
        selection, code, _ = select_tokens(reducer, plans, parts, layers, shown, modality=stream, per_crop=served.each)
        raise_if_invalid(int(code), reducer)
        merged = merged_rows(features, selection)
        number = torch.arange(selection.index.shape[1], device=features.device)
        position = selection.index if reducer.options.positions == "keep" else number.expand_as(selection.index)
        order = torch.where(selection.valid, position, features.shape[1] + len(number)).argsort(dim=1, stable=True)
    return [
        (merged[i, order[i, : plan.entry]], selection.index[i, order[i, : plan.entry]]) for i, plan in enumerate(plans)
    ]
