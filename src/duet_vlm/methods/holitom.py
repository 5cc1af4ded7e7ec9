"""HoliTom, its stage before the decoder: what stands still in the best windows of a clip is merged over time, the rest is ranked by attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duet_vlm.budget import Keep
from duet_vlm.methods.clip import ClipReducer, Rows
from duet_vlm.ops.clips import Clips, Windows, alike_before, divided
from duet_vlm.ops.peaks import peaks
from duet_vlm.ops.select import top
from duet_vlm.ops.still import Sets, everywhere, gains, likest, members_of
from duet_vlm.reducer import VisionView, check_choice
from duet_vlm.registry import register


@register("holitom")
@dataclass(frozen=True)
class HoliTom(ClipReducer):
    """HoliTom (NeurIPS 2025, arXiv 2505.21334), the stage before the decoder.

    A place stands still in a window of frames if every two neighbours have a cosine above ``threshold`` there. The clip is cut into windows so that
    averaging what stands still saves the most tokens (dynamic programming). Of these averages density peaks stay, ``own`` parts themselves and the
    rest the mean of those that are nearest to them; of the rest of every frame the most attended tokens stay and the others leave.

    Parameters
    ----------
    keep : int or float, optional
        Tokens per span or the fraction of them. A budget of n keeps n.
    threshold : float
        Cosine above which a place stands still, in [-1, 1].
    own : float or None
        Weight of a peak in its row, in [0, 1]; None: the row is a plain mean.
    neighbours, window : int
        Rows that decide the density around one (no more than peaks); the most frames of a window.
    rows : str
        Order of the rows, which matters for ``positions="compact"``: "raster", or by window and "sets" (released code).

    Cost: attention of one vision layer, a cosine per token, a table of frames x frames, a table of distances per window. Needs vision attention and
    steps of time. Usable in training (the choice carries no gradient, the rows do).

    Differences from the authors' code (cokeshao/HoliTom): counts add up to the budget, all sets keep the same share (released: rounded half to even
    where something stands still, up elsewhere); no window averages away more than the budget asks for, the likest places first; one clip of a batch
    does not change another. Merging dynamic tokens, an option with which the released code stops, is left out, as in all of its scripts.
    """

    paper = "HoliTom, NeurIPS 2025, arXiv 2505.21334"
    summary = "merge over time what stands still in the best windows of a clip, keep the most attended of the rest, before the decoder"
    signals = frozenset({"importance"})
    reads_places = True

    threshold: float = 0.8
    own: float | None = 0.6
    neighbours: int = 7
    window: int = 1024
    rows: str = "raster"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: a cosine, in [-1, 1]")
        if self.own is not None and not 0 <= self.own <= 1:
            raise ValueError(f"own={self.own}: a share, in [0, 1], or None")
        for name in ("neighbours", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a number of {'frames' if name == 'window' else 'rows'}, at least 1")
        check_choice("rows", self.rows, ("raster", "sets"))

    @classmethod
    def official(cls, keep: Keep = 0.15, **fields: Any) -> HoliTom:
        """The released settings and order, with a count that is given."""
        return cls(**{"keep": keep, "rows": "sets", "positions": "compact", "keep_predicting": False, "signal_queries": None} | fields)

    def reduced(self, view: VisionView, clips: Clips, count: Tensor) -> Rows:
        assert view.importance is not None and view.features is not None
        rows = clips.grid(view.features)
        alike = self.alike(rows, clips)
        windows = gains(alike > self.threshold, clips.length, self.window)
        places, score = self.still(alike, clips, windows)
        sets = Sets.of(clips, windows, rows, likest(places, score, windows, clips.placed.sum(1) - count))
        return self.merged(sets, clips.grid(view.importance), divided(count, sets.sizes, sets.sizes))

    def alike(self, rows: Tensor, clips: Clips) -> Tensor:
        """Cosine of neighbours at the same place: [B, T, P, C] -> [B, T - 1, P], -1 where one is missing."""
        return alike_before(rows).masked_fill(~(clips.real[:, 1:] & clips.real[:, :-1]), -1.0)

    def still(self, alike: Tensor, clips: Clips, windows: Windows) -> tuple[Tensor, Tensor]:
        """Places that stand still in every window [B, T, P] bool, and their smallest cosine there."""
        inside = windows.number[:, 1:] == windows.number[:, :-1]
        least = alike.new_full(clips.real.shape, float("inf"))
        steps = alike.masked_fill(~inside[..., None], float("inf"))
        least = least.scatter_reduce(1, windows.number[:, 1:, None].expand(steps.shape), steps, "amin")
        return everywhere(clips, windows) & (least > self.threshold), least

    def merged(self, sets: Sets, attention: Tensor, count: Tensor) -> Rows:
        """``count`` [B, 2 T] rows of every set: density peaks of what stands still, the most attended [B, T, P] of the rest."""
        steps, shape = attention.shape[1], sets.real.shape
        real = sets.real[:, :steps].flatten(0, 1)
        peak, near, _ = peaks(sets.rows[:, :steps].flatten(0, 1), real, count[:, :steps].flatten(), self.neighbours, capped=True)
        others = members_of(near, real & ~peak)
        none = ~peak.any(1, keepdim=True)
        own = 1 / (others + 1) if self.own is None else torch.where(others > 0, self.own, 1.0)
        weight = torch.where(peak, own, ((1 - own) / others.clamp(min=1)).gather(1, near))
        best = top(attention.flatten(0, 1), sets.real[:, steps:].flatten(0, 1), count[:, steps:].flatten())
        chosen = torch.cat([x.view(-1, steps, shape[2]) for x in (peak, best)], 1)
        place = torch.arange(shape[2], device=near.device).expand(near.shape)
        place = torch.cat([x.view(-1, steps, shape[2]) for x in (near.masked_fill(none, -1), torch.where(best, place, -1))], 1)
        weight = torch.cat([x.view(-1, steps, shape[2]) for x in (weight, torch.ones_like(weight))], 1)
        return Rows(sets.kept(chosen), *sets.joins(place, weight), sets.sequence() if self.rows == "sets" else None)
