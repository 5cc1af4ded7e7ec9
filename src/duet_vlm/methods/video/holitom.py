"""HoliTom: merge static video regions over time, keep the most attended of the rest; one more merge inside the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from duet_vlm.methods.video.video_base import ScheduledVideoReducer, VideoRows
from duet_vlm.ops.dpc_knn import peaks
from duet_vlm.ops.groups import ranks_in_groups
from duet_vlm.ops.merge import nearest_anchor, row_numbers
from duet_vlm.ops.ragged import pack_right
from duet_vlm.ops.select import top
from duet_vlm.ops.static_regions import StaticDynamicSets, everywhere, gains, members_of, most_similar
from duet_vlm.ops.video import FrameWindows, VideoTokens, alike_before, split_windows
from duet_vlm.planning.budget import Keep, Schedule
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.decoder import DecoderView
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.utils.field_types import check_choice


@register("holitom")
@dataclass(frozen=True)
class HoliTom(ScheduledVideoReducer):
    """HoliTom (NeurIPS 2025, arXiv 2505.21334): holistic token merging, before the decoder and once inside it.

    A place of the grid is static in a window of frames if every two neighbouring frames have a cosine above
    ``threshold`` there. The video is cut into windows such that averaging the static places removes the most tokens
    (dynamic programming). Among these averages density peaks are kept and the others merged into the nearest peak, with
    weight ``own`` on the peak; of the dynamic tokens of every frame the most attended ones are kept and the others
    dropped. Inside the decoder (layer 18 of 28) the half with the most attention from the last text token is kept, and
    every other token is merged into the one that it resembles most (cosine of hidden states).

    Parameters beyond ``ScheduledVideoReducer``
    ----------
    threshold : float
        Cosine above which a place is static, in [-1, 1].
    own : float or None
        Weight of a peak in its merged token, in [0, 1]; None: a plain mean.
    neighbours : int
        Rows in the density estimate, at least 1, and no more than there are peaks.
    window : int
        Largest number of frames of a window, at least 1.
    rows : str
        Order of the kept tokens, which matters for ``positions="compact"``: "raster", or by window and "sets" (released
        code).
    joining : str
        Inside the decoder, "mean": a merged token is the mean of its members; "halving": members are added one after
        the other and each time the sum is halved (released code), so that the last weighs as much as all before it.

    Cost: attention of one vision layer, a cosine per token, a table of frames x frames, a table of distances per
    window; one key projection and one query row, cosines of kept tokens with all others. Needs: vision attention,
    frames, text after the video. Usable in training (the choice carries no gradient, merged tokens do).

    Differences from the authors' code (cokeshao/HoliTom): counts add up to the budget, all sets keep the same share
    (released: rounded half to even where something is static, up elsewhere); no window averages away more tokens than
    the budget requires, the most similar places first; videos of a batch do not affect each other. Merging dynamic
    tokens, an option with which the released code stops, is left out, as in all of its scripts. Under sdpa the released
    code runs the ranking layer without a causal mask; here it stays causal, also in the preset.
    """

    paper = "HoliTom, NeurIPS 2025, arXiv 2505.21334"
    summary = "merge over time what stands still in the best windows of a clip, keep the most attended of the rest; inside the decoder once more"
    paper_schedule: ClassVar[Schedule] = ((18, 0.5),)
    layers: ClassVar[int] = 28
    requires = frozenset({Input.IMPORTANCE, Input.PROJECTED_FEATURES, Input.SCORES, Input.HIDDEN_STATES})
    merges = True
    compares_positions = True

    default_options = TokenOptions(text_query="last")
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
                raise ValueError(
                    f"{name}={getattr(self, name)}: a number of {'frames' if name == 'window' else 'rows'}, at least 1"
                )
        check_choice("rows", self.rows, ("raster", "sets"))
        check_choice("joining", self.joining, ("mean", "halving"))

    @classmethod
    def official(cls, keep: Keep | None = 0.15, schedule: Schedule | None = ((18, 0.5),), **fields: Any) -> HoliTom:
        """Return the released settings and order, with given counts; ``schedule=()``: no stage inside the decoder, as
        in some released scripts.
        """
        options = TokenOptions(positions="compact", protect_predicting_tokens=False, signal_queries=None)
        return cls.from_preset(options, fields, keep=keep, schedule=schedule, rows="sets", joining="halving")

    def reduced(self, view: EncoderView, clips: VideoTokens, count: Tensor) -> VideoRows:
        rows = clips.grid(view.require(Input.FEATURES))
        alike = self.alike(rows, clips)
        windows = gains(alike > self.threshold, clips.length, self.window)
        places, score = self.still(alike, clips, windows)
        sets = StaticDynamicSets.of(
            clips, windows, rows, most_similar(places, score, windows, clips.placed.sum(1) - count)
        )
        return self.merged(
            sets, clips.grid(view.require(Input.IMPORTANCE)), split_windows(count, sets.sizes, sets.sizes)
        )

    def alike(self, rows: Tensor, clips: VideoTokens) -> Tensor:
        """Cosine of neighbouring frames at the same place: [B, T, P, C] -> [B, T - 1, P], -1 where one has no token."""
        return alike_before(rows).masked_fill(~(clips.real[:, 1:] & clips.real[:, :-1]), -1.0)

    def still(self, alike: Tensor, clips: VideoTokens, windows: FrameWindows) -> tuple[Tensor, Tensor]:
        """Static places of every window [B, T, P] bool, and their smallest cosine there [B, T, P]."""
        inside = windows.number[:, 1:] == windows.number[:, :-1]
        least = alike.new_full(clips.real.shape, float("inf"))
        steps = alike.masked_fill(~inside[..., None], float("inf"))
        least = least.scatter_reduce(1, windows.number[:, 1:, None].expand(steps.shape), steps, "amin")
        return everywhere(clips, windows) & (least > self.threshold), least

    def merged(self, sets: StaticDynamicSets, attention: Tensor, count: Tensor) -> VideoRows:
        """Keep ``count`` [B, 2 T] tokens of every set: density peaks of the static ones, the most attended [B, T, P] of
        the rest.
        """
        steps, shape = attention.shape[1], sets.real.shape
        real = sets.real[:, :steps].flatten(0, 1)
        peak, near, _ = peaks(
            sets.rows[:, :steps].flatten(0, 1), real, count[:, :steps].flatten(), self.neighbours, capped=True
        )
        others = members_of(near, real & ~peak)
        none = ~peak.any(1, keepdim=True)
        own = 1 / (others + 1) if self.own is None else torch.where(others > 0, self.own, 1.0)
        weight = torch.where(peak, own, ((1 - own) / others.clamp(min=1)).gather(1, near))
        best = top(attention.flatten(0, 1), sets.real[:, steps:].flatten(0, 1), count[:, steps:].flatten())
        chosen = torch.cat([x.view(-1, steps, shape[2]) for x in (peak, best)], 1)
        column = torch.arange(shape[2], device=near.device).expand(near.shape)
        column = torch.cat(
            [x.view(-1, steps, shape[2]) for x in (near.masked_fill(none, -1), torch.where(best, column, -1))], 1
        )
        weight = torch.cat([x.view(-1, steps, shape[2]) for x in (weight, torch.ones_like(weight))], 1)
        return VideoRows(
            sets.kept(chosen), *sets.joins(column, weight), sets.sequence() if self.rows == "sets" else None
        )

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
