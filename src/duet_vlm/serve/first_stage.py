"""Features of images or videos, from a tower or projector, reduced to those that enter the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from duet_vlm.ops.merge import merged_rows
from duet_vlm.ops.ragged import pad_rows
from duet_vlm.reducers.encoder_view import LayerView
from duet_vlm.runtime.encode.selection import part_sizes, select_tokens
from duet_vlm.runtime.validation import raise_if_invalid
from duet_vlm.serve.served_method import ServedMethod

TowerSignals = tuple[Sequence[Tensor], Sequence[Tensor]]


def reduce_rows(
    served: ServedMethod,
    rows: Sequence[Tensor],
    parts: Sequence[Tensor],
    request_budgets: Sequence[float],
    signals: TowerSignals | None,
    method_features: Sequence[Tensor] | None = None,
    stream: str = "image",
) -> list[tuple[Tensor, Tensor]]:
    """Reduce each image, or each video, to the tokens that enter the decoder.

    Parameters
    ----------
    rows : sequence of Tensor
        Per image [n, C]: the projector's input, or, for methods that use projected tokens and for grid mergers, its
        output.
    parts : sequence of Tensor
        Per image, on the host: the part (crop, frame) of each token [n], -1 for newlines.
    request_budgets : sequence of float
        Per image the budget of its request, as ``ServedMethod.request_budget`` encodes it.
    signals : (sequence, sequence) of Tensor, or None
        Importance [n] and mean keys [n, d] per image, for methods that use them.
    method_features : sequence of Tensor, optional
        Per image the features [n, c] that the method sees, if other than ``rows``.
    stream : str
        "video": these are videos, and their parts are time steps.

    Returns
    -------
    list of (Tensor, Tensor)
        Per image the kept features [K, C], as many as planned, and their token numbers [K]: in the method's order where
        positions are compact, ascending where they are kept.
    """
    plans = [served.span(*part_sizes(part), budget) for part, budget in zip(parts, request_budgets, strict=True)]
    if not any(plan.merges for plan in plans):
        return [(row, torch.arange(len(row), device=row.device)) for row in rows]
    reducer = served.reducer
    features, _ = pad_rows(list(rows))
    layers: tuple[LayerView, ...] = ()
    if reducer.signals:
        if signals is None:
            raise RuntimeError(f"{reducer.name} ranks by the attention of the vision tower, and none was recorded")
        layers = (LayerView(pad_rows(list(signals[0]))[0], keys=pad_rows(list(signals[1]))[0]),)
    with torch.no_grad():
        part = features if method_features is None else pad_rows(list(method_features))[0]
        selection, code, _ = select_tokens(reducer, plans, parts, layers, part, stream=stream, each=served.each)
        raise_if_invalid(int(code), reducer)
        merged = merged_rows(features, selection)
        number = torch.arange(selection.index.shape[1], device=features.device)
        sort_key = selection.index if reducer.positions == "keep" else number.expand_as(selection.index)
        order = torch.where(selection.valid, sort_key, features.shape[1] + len(number)).argsort(dim=1, stable=True)
    return [(merged[i, order[i, : plan.entry]], selection.index[i, order[i, : plan.entry]]) for i, plan in enumerate(plans)]
