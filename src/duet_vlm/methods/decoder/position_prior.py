"""Position prior of attention: the mean attention of each place over many images, recorded and looked up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.reducers.calibration import Calibration
from duet_vlm.reducers.decoder import DecoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.observer import Observer
from duet_vlm.reducers.options import TokenOptions

Grid = tuple[int, int] | None


@dataclass(frozen=True)
class PositionBiasObserver(Observer):
    """Record the attention of visual tokens from the last text token in the layer before ``layer``; the mean per grid
    is stored.
    """

    score_layer_offset = 1
    requires = frozenset({Input.SCORES, Input.TOKENS})

    default_options = TokenOptions(text_query="last")
    layer: int = 2

    def extra_stages(self, depth: int) -> frozenset[int]:
        return frozenset({self.layer})

    def observe(self, view: DecoderView) -> list[tuple[str, Tensor]]:
        rows = [
            (scores[:there], *view.spans[int(span)], view.grids[int(span)])
            for scores, (there, _), span in self._spans(view)
        ]
        return [
            (name_of(size, grid), scores.float().cpu().view(shape_of(size, grid))) for scores, _, size, grid in rows
        ]

    def _spans(self, view: DecoderView) -> list[Any]:
        span_index, _ = view.require(Input.TOKENS)
        return [
            row for row in zip(view.require(Input.SCORES), view.host_counts, span_index[:, 0], strict=True) if row[1][0]
        ]

    def result(self, depth: int) -> dict[str, Any]:
        by_layer: dict[str, list[Tensor]] = {}
        for name, scores in (pair for note in self.observations.entries for pair in note):
            by_layer.setdefault(name, []).append(scores)
        return {name: torch.stack(scores).mean(0) for name, scores in by_layer.items()}


def bias_of(stored: Calibration, view: DecoderView, resize: bool) -> Tensor:
    """Look up the stored attention of each token's place.

    Parameters
    ----------
    stored : Calibration
        Mean attention per grid.
    view : DecoderView
        Tokens and grids of the prompt.
    resize : bool
        Interpolate an unknown grid from the largest stored one.

    Returns
    -------
    Tensor
        [B, V].

    Raises
    ------
    ValueError
        If a grid is unknown and ``resize`` is False.
    """
    scores = view.require(Input.SCORES)
    if scores.is_meta:  # costs are counted on shapes
        return torch.ones_like(scores)

    def of(size: int, grid: Grid) -> Tensor:
        name = name_of(size, grid)
        if name in stored.data:
            return stored.data[name].flatten()
        if not resize:
            known = ", ".join(sorted(stored.data))
            raise ValueError(
                f"{stored.path} knows no grid of {name}, only {known}: resize=True interpolates, or {stored.advice}"
            )
        largest = max(stored.data.values(), key=Tensor.numel)
        return nn.functional.interpolate(largest[None, None], shape_of(size, grid), mode="bilinear").flatten()

    every = [of(size, grid).to(scores) for (_, size), grid in zip(view.spans, view.grids, strict=True)]
    return nn.utils.rnn.pad_sequence(every, batch_first=True)[view.require(Input.TOKENS)]


def shape_of(size: int, grid: Grid) -> tuple[int, int]:
    """Rows and columns of a span; (1, size) where the grid is unknown or has other tokens beside it."""
    return grid if grid is not None and grid[0] * grid[1] == size else (1, size)


def name_of(size: int, grid: Grid) -> str:
    """Name of a grid in the stored file, "rowsxcolumns"."""
    return "x".join(map(str, shape_of(size, grid)))
