"""HoliTom: what stands still in the best windows of a clip is merged over time, the rest ranked by attention; once more inside the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from duet_vlm.methods.video_base import ScheduledVideoReducer, VideoRows
from duet_vlm.ops.dpc_knn import peaks
from duet_vlm.ops.groups import ranks_in_groups
from duet_vlm.ops.merge import nearest_anchor, row_numbers
from duet_vlm.ops.ragged import pack_right
from duet_vlm.ops.select import top
from duet_vlm.ops.static_regions import StaticDynamicSets, everywhere, gains, members_of, most_similar
from duet_vlm.ops.video import FrameWindows, VideoTokens, alike_before, split_windows
from duet_vlm.planning.budget import Keep, Schedule
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import check_choice
from duet_vlm.reducers.decoder import DecoderView
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.registry import register


@register("holitom")
@dataclass(frozen=True)
class HoliTom(ScheduledVideoReducer):
    """HoliTom (NeurIPS 2025, arXiv 2505.21334): merge what a clip repeats, before the decoder and once inside it.

    A place stands still in a window of frames if every two neighbours have a cosine above ``threshold`` there. The clip is cut into windows so that
    averaging what stands still saves the most tokens (dynamic programming). Of these averages density peaks stay, ``own`` parts themselves and the
    rest the mean of those that are nearest to them; of the rest of every frame the most attended tokens stay and the others leave. Inside the
    decoder (layer 18 of 28) half of them stay, those that the last text row attends to most, and every other one joins the one that it is most
    like (cosine of hidden states).

    Parameters beyond ``ScheduledVideoReducer``
    ----------
    threshold : float
        Cosine above which a place stands still, in [-1, 1].
    own : float or None
        Weight of a peak in its row, in [0, 1]; None: the row is a plain mean.
    neighbours, window : int
        Rows that decide the density around one (no more than peaks); the most frames of a window.
    rows : str
        Order of the rows, which matters for ``positions="compact"``: "raster", or by window and "sets" (released code).
    joining : str
        Inside the decoder, "mean": a row is the mean of its tokens; "halving": tokens are added one after the other, each time halving what was
        there (released code), so that the last weighs as much as all before it.

    Cost: attention of one vision layer, a cosine per token, a table of frames x frames, a table of distances per window; one key projection and one
    query row, cosines of kept tokens with all others. Needs vision attention, steps of time, text after the clip. Usable in training (the choice
    carries no gradient, the rows do).

    Differences from the authors' code (cokeshao/HoliTom): counts add up to the budget, all sets keep the same share (released: rounded half to even
    where something stands still, up elsewhere); no window averages away more than the budget asks for, the likest places first; one clip of a batch
    does not change another. Merging dynamic tokens, an option with which the released code stops, is left out, as in all of its scripts. Under sdpa
    the released code runs the layer that ranks without a causal mask; here it stays causal, in the preset, too.
    """

    paper = "HoliTom, NeurIPS 2025, arXiv 2505.21334"
    summary = "merge over time what stands still in the best windows of a clip, keep the most attended of the rest; inside the decoder once more"
    paper_schedule: ClassVar[Schedule] = ((18, 0.5),)
    layers: ClassVar[int] = 28
    requires = frozenset({Input.IMPORTANCE, Input.PROJECTED_FEATURES, Input.SCORES, Input.HIDDEN_STATES})
    merges = True
    compares_positions = True

    text_query: str = "last"
    threshold: float = 0.8
    own: float | None = 0.6
    neighbours: int = 7
    window: int = 1024
    rows: str = "raster"
    joining: str = "mean"

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
        check_choice("joining", self.joining, ("mean", "halving"))

    @classmethod
    def official(cls, keep: Keep | None = 0.15, schedule: Schedule | None = ((18, 0.5),), **fields: Any) -> HoliTom:
        """The released settings and order, with counts that are given; ``schedule=()``: nothing inside the decoder, as in some of its scripts."""
        released: dict[str, Any] = {"rows": "sets", "positions": "compact", "joining": "halving", "protect_predicting_tokens": False, "signal_queries": None}
        return cls(**{"keep": keep, "schedule": schedule} | released | fields)

    def reduced(self, view: EncoderView, clips: VideoTokens, count: Tensor) -> VideoRows:
        rows = clips.grid(view.require(Input.FEATURES))
        alike = self.alike(rows, clips)
        windows = gains(alike > self.threshold, clips.length, self.window)
        places, score = self.still(alike, clips, windows)
        sets = StaticDynamicSets.of(clips, windows, rows, most_similar(places, score, windows, clips.placed.sum(1) - count))
        return self.merged(sets, clips.grid(view.require(Input.IMPORTANCE)), split_windows(count, sets.sizes, sets.sizes))

    def alike(self, rows: Tensor, clips: VideoTokens) -> Tensor:
        """Cosine of neighbours at the same place: [B, T, P, C] -> [B, T - 1, P], -1 where one is missing."""
        return alike_before(rows).masked_fill(~(clips.real[:, 1:] & clips.real[:, :-1]), -1.0)

    def still(self, alike: Tensor, clips: VideoTokens, windows: FrameWindows) -> tuple[Tensor, Tensor]:
        """Places that stand still in every window [B, T, P] bool, and their smallest cosine there."""
        inside = windows.number[:, 1:] == windows.number[:, :-1]
        least = alike.new_full(clips.real.shape, float("inf"))
        steps = alike.masked_fill(~inside[..., None], float("inf"))
        least = least.scatter_reduce(1, windows.number[:, 1:, None].expand(steps.shape), steps, "amin")
        return everywhere(clips, windows) & (least > self.threshold), least

    def merged(self, sets: StaticDynamicSets, attention: Tensor, count: Tensor) -> VideoRows:
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
        return VideoRows(sets.kept(chosen), *sets.joins(place, weight), sets.sequence() if self.rows == "sets" else None)

    def prune_tokens(self, view: DecoderView) -> Selection:
        scores = view.require(Input.SCORES)
        stays = top(scores, view.valid, view.num_keep)
        index, real = pack_right(stays, max(stay for _, stay in view.host_counts))
        tokens = torch.arange(stays.shape[1], device=stays.device).expand_as(stays)
        leaves = view.valid & ~stays & real.any(1, keepdim=True)
        into = nearest_anchor(view.require(Input.HIDDEN_STATES), tokens, index, real).masked_fill(~leaves, -1)
        if self.joining == "mean":
            return Selection(index, real, tokens, into)
        turn = ranks_in_groups(torch.zeros_like(scores), into, leaves)
        times = torch.zeros_like(index).scatter_add(1, into.clamp(min=0), leaves.long())
        into = torch.where(stays, row_numbers(index, real, stays.shape[1]), into)
        halved = times.gather(1, into.clamp(min=0)) - torch.where(leaves, turn, 0)
        return Selection(index, real, tokens, into, weights=0.5 ** halved.float())
