"""PruneVid, its stages before the decoder: windows of like frames, what stands still merged over time, every set merged over space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.budget import Keep
from duet_vlm.methods.clip import ClipReducer, Rows
from duet_vlm.ops.clips import Clips, Windows, divided
from duet_vlm.ops.merge import unit_rows
from duet_vlm.ops.peaks import peaks
from duet_vlm.ops.still import Sets, everywhere, likest, members_of
from duet_vlm.reducer import VisionView, check_choice
from duet_vlm.registry import register

NEIGHBOURS = 7  # tokens that decide how dense it is around one


@register("prunevid")
@dataclass(frozen=True)
class PruneVid(ClipReducer):
    """PruneVid (Findings of ACL 2025, arXiv 2412.16117), the stages before the decoder.

    Frames are clustered by their means (density peaks) and clusters made contiguous. A place stands still in such a window if the mean cosine of its
    tokens over all pairs of frames is above ``threshold``: these are averaged. What stands still in a window, and the rest of every frame, is
    clustered again, and every cluster becomes its mean. Nothing leaves without being merged.

    Parameters
    ----------
    keep : int or float, optional
        Tokens per span or the fraction of them. A budget of n keeps n.
    windows : float
        Clusters of frames, as a fraction of the frames, in (0, 1].
    threshold : float
        Mean cosine above which a place stands still, in [-1, 1].
    neighbours : int
        Frames that decide the density around one, itself included.
    rows : str
        Order of the rows, which matters for ``positions="compact"``: "raster", or by window and "sets", within these by score (released code).

    Cost: a table of distances per frame and one of frames. Needs steps of time, no attention. Usable in training (the choice carries no gradient, the
    rows do).

    Differences from the authors' code (Visual-AI/PruneVid): counts add up to the budget, all sets keep the same share (released: half of every set of
    more than 14 tokens); no window averages away more than the budget asks for, the likest places first; kept positions; frames of equal density
    by index, not by noise. The stage inside the decoder (attention at layer 10, caches of the layers before it cut as well) is not part of it.
    """

    paper = "PruneVid, Findings of ACL 2025, arXiv 2412.16117"
    summary = "merge over time what stands still in windows of like frames, then every set into clusters, before the decoder"
    reads_places = True

    windows: float = 0.25
    threshold: float = 0.8
    neighbours: int = 7
    rows: str = "raster"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.windows <= 1:
            raise ValueError(f"windows={self.windows}: clusters as a fraction of the frames, in (0, 1]")
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: a cosine, in [-1, 1]")
        if self.neighbours < 1:
            raise ValueError(f"neighbours={self.neighbours}: a number of frames, at least 1")
        check_choice("rows", self.rows, ("raster", "sets"))

    @classmethod
    def official(cls, keep: Keep = 0.17, **fields: Any) -> PruneVid:
        """The released settings and order, with a count that is given."""
        return cls(**{"keep": keep, "rows": "sets", "positions": "compact", "keep_predicting": False} | fields)

    def reduced(self, view: VisionView, clips: Clips, count: Tensor) -> Rows:
        assert view.features is not None
        rows = clips.grid(view.features)
        windows = self.cut(rows, clips)
        places, score = self.still(rows, clips, windows)
        sets = Sets.of(clips, windows, rows, likest(places, score, windows, clips.placed.sum(1) - count))
        return self.merged(sets, divided(count, sets.sizes, sets.sizes))

    def cut(self, rows: Tensor, clips: Clips) -> Windows:
        """Windows of like frames of rows [B, T, P, C]."""
        length = clips.length
        steps = torch.arange(rows.shape[1], device=rows.device) < length[:, None]
        count = (length * self.windows + 1e-6).floor().long().clamp(min=1)
        _, near, _ = peaks(clips.means(rows), steps, count, self.neighbours)
        return contiguous(near, length)

    def still(self, rows: Tensor, clips: Clips, windows: Windows) -> tuple[Tensor, Tensor]:
        """Places that stand still in every window [B, T, P] bool, and the mean cosine of all pairs of their tokens."""
        unit = unit_rows(rows).masked_fill(~clips.real[..., None], 0)
        pairs = (windows.length * (windows.length - 1)).clamp(min=1)[..., None]
        score = (windows.sums(unit).square().sum(-1) - windows.sums(unit.square().sum(-1))) / pairs
        return everywhere(clips, windows) & (score > self.threshold), score

    def merged(self, sets: Sets, count: Tensor) -> Rows:
        """``count`` [B, 2 T] cluster means of every set."""
        shape, real = sets.real.shape, sets.real.flatten(0, 1)
        peak, near, rank = peaks(sets.rows.flatten(0, 1), real, count.flatten(), NEIGHBOURS)
        weight = 1 / members_of(near, real).gather(1, near).clamp(min=1)
        near = near.masked_fill(~(real & peak.any(1, keepdim=True)), -1)
        as_is = count.flatten()[:, None] >= real.sum(1, keepdim=True)
        rank = torch.where(as_is, torch.arange(shape[2], device=rank.device), rank)
        order = sets.sequence(rank.view(shape)) if self.rows == "sets" else None
        return Rows(sets.kept(peak.view(shape)), *sets.joins(near.view(shape), weight.view(shape)), order)


def contiguous(label: Tensor, length: Tensor) -> Windows:
    """Labels of steps [B, T] as windows. From left to right, a run that is shorter than the longest of its label, or the only step of its kind, goes
    to the longer of the runs beside it, the left one on a tie; runs grow by those that join them."""
    steps = label.shape[1]
    at = torch.arange(steps, device=label.device)
    runs = Windows.of(nn.functional.pad(label[:, 1:] != label[:, :-1], (1, 0), value=True), length)
    name, size = label.gather(1, runs.first), runs.length
    longest = torch.zeros_like(size).scatter_reduce_(1, name, size, "amax").gather(1, name)
    moves = ((size < longest) | (longest == 1)) & (size > 0)
    before, behind = torch.zeros_like(size[:, 0]), nn.functional.pad(size, (0, 1))
    fresh, grown = [], torch.zeros_like(before)  # whether a run begins a window; what has joined the next run so far
    for run in range(steps):
        left, own, right = before, size[:, run] + grown, behind[:, run + 1]
        to_left = moves[:, run] & (left >= right) & (left > 0)
        to_right = moves[:, run] & ~to_left & (right > 0)
        fresh.append(~to_left & (grown == 0))
        before = torch.where(to_left, left + own, torch.where(to_right, left, own))
        grown = torch.where(to_right, own, 0)
    starts = torch.stack(fresh, 1).gather(1, runs.number) & (at == runs.of_step(runs.first))
    return Windows.of(starts, length)
