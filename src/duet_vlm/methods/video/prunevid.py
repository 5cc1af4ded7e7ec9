"""PruneVid: merge video tokens over time and space before the decoder, drop by the question inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from duet_vlm.methods.video.video_base import ScheduledVideoReducer, VideoRows
from duet_vlm.ops.dpc_knn import peaks
from duet_vlm.ops.groups import equal_shares, numbered, ranks_in_groups
from duet_vlm.ops.merge import unit_rows
from duet_vlm.ops.static_regions import StaticDynamicSets, everywhere, members_of, most_similar
from duet_vlm.ops.video import FrameWindows, VideoTokens, split_windows
from duet_vlm.planning.budget import Keep, Schedule
from duet_vlm.reducers.decoder import DecoderView
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.scoring import ScoringRules
from duet_vlm.utils.field_types import check_choice

NEIGHBOURS = 7  # tokens that decide how dense it is around one
SETS = 1 << 24  # more than a clip has


@register("prunevid")
@dataclass(frozen=True)
class PruneVid(ScheduledVideoReducer):
    """PruneVid (Findings of ACL 2025, arXiv 2412.16117): spatial-temporal merging, then a drop by the question.

    Frames are clustered by their means (density peaks) and clusters made contiguous: windows. A place of the grid is
    static in a window if the mean cosine of its tokens over all pairs of frames is above ``threshold``; its tokens are
    averaged. The static tokens of each window, and the dynamic tokens of each frame, form sets; each set is clustered
    again, and every cluster becomes its mean. No token is dropped without being merged. Inside the decoder, before
    layer 11 of 32, every set keeps the same share: the tokens with the largest attention of any head and text token;
    earlier layers drop the others from their cache (``trim_kv_cache=True``).

    Parameters beyond ``ScheduledVideoReducer``
    ----------
    windows : float
        Clusters of frames, as a fraction of the frames, in (0, 1].
    threshold : float
        Mean cosine above which a place is static, in [-1, 1].
    neighbours : int
        Frames in the density estimate, the frame itself included, at least 1.
    rows : str
        Order of the merged tokens, which matters for ``positions="compact"``: "raster", or by window and "sets", within
        these by score (released code).

    Cost: a table of distances per frame and one of frames; one key projection and a query per text token at the drop.
    Needs: frames, text after the video; no vision attention. Usable in training (the choice carries no gradient, merged
    tokens do).

    Differences from the authors' code (Visual-AI/PruneVid): counts add up to the budget, all sets keep the same share
    (released: half of every set of more than 14 tokens); no window averages away more tokens than the budget requires,
    the most similar places first; kept positions; frames of equal density by index, not by noise. Inside the decoder
    the shares of the sets add up, too (released: each rounded down separately, so that small sets keep none).
    """

    paper = "PruneVid, Findings of ACL 2025, arXiv 2412.16117"
    summary = "merge over time what stands still in windows of like frames, then every set into clusters; a drop by text in each"
    paper_schedule: ClassVar[Schedule] = ((11, 0.4),)
    requires = frozenset({Input.PROJECTED_FEATURES, Input.SCORES, Input.TOKENS, Input.TAGS})
    compares_positions = True

    default_options = TokenOptions(trim_kv_cache=True)
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
    def official(cls, keep: Keep | None = 0.17, schedule: Schedule | None = ((11, 0.4),), **fields: Any) -> PruneVid:
        """Return the released settings and order, with given counts."""
        options = TokenOptions(positions="compact", protect_predicting_tokens=False)
        return cls.from_preset(options, fields, keep=keep, schedule=schedule, rows="sets")

    def reduced(self, view: EncoderView, clips: VideoTokens, count: Tensor) -> VideoRows:
        rows = clips.grid(view.require(Input.FEATURES))
        windows = self.cut(rows, clips)
        places, score = self.still(rows, clips, windows)
        sets = StaticDynamicSets.of(
            clips, windows, rows, most_similar(places, score, windows, clips.placed.sum(1) - count)
        )
        return self.merged(sets, split_windows(count, sets.sizes, sets.sizes))._replace(notes=clips.rows(sets.number))

    def cut(self, rows: Tensor, clips: VideoTokens) -> FrameWindows:
        """Cut videos into windows of similar frames: rows [B, T, P, C] -> windows."""
        length = clips.length
        steps = torch.arange(rows.shape[1], device=rows.device) < length[:, None]
        count = (length * self.windows + 1e-6).floor().long().clamp(min=1)
        _, near, _ = peaks(clips.means(rows), steps, count, self.neighbours)
        return contiguous(near, length)

    def still(self, rows: Tensor, clips: VideoTokens, windows: FrameWindows) -> tuple[Tensor, Tensor]:
        """Static places of every window [B, T, P] bool, and the mean cosine of all pairs of their tokens [B, T, P]."""
        unit = unit_rows(rows).masked_fill(~clips.real[..., None], 0)
        pairs = (windows.length * (windows.length - 1)).clamp(min=1)[..., None]
        score = (windows.sums(unit).square().sum(-1) - windows.sums(unit.square().sum(-1))) / pairs
        return everywhere(clips, windows) & (score > self.threshold), score

    def merged(self, sets: StaticDynamicSets, count: Tensor) -> VideoRows:
        """Merge every set into ``count`` [B, 2 T] cluster means."""
        shape, real = sets.real.shape, sets.real.flatten(0, 1)
        peak, near, rank = peaks(sets.rows.flatten(0, 1), real, count.flatten(), NEIGHBOURS)
        weight = 1 / members_of(near, real).gather(1, near).clamp(min=1)
        near = near.masked_fill(~(real & peak.any(1, keepdim=True)), -1)
        as_is = count.flatten()[:, None] >= real.sum(1, keepdim=True)
        rank = torch.where(as_is, torch.arange(shape[2], device=rank.device), rank)
        order = sets.sequence(rank.view(shape)) if self.rows == "sets" else None
        return VideoRows(sets.kept(peak.view(shape)), *sets.joins(near.view(shape), weight.view(shape)), order)

    def scoring_rules(self) -> ScoringRules:
        return ScoringRules(score_heads="most")

    def prune_tokens(self, view: DecoderView) -> Tensor:
        span_index, _ = view.require(Input.TOKENS)
        group = numbered(span_index * SETS + view.require(Input.TAGS).long(), view.valid)
        size = torch.zeros_like(group).scatter_add(1, group, view.valid.long())
        return self.of_sets(view.require(Input.SCORES), group, view.valid, equal_shares(size, view.num_keep))

    def of_sets(self, scores: Tensor, group: Tensor, valid: Tensor, count: Tensor) -> Tensor:
        """Mask [B, V] of the ``count`` [B, G] best tokens of every set."""
        return valid & (ranks_in_groups(scores, group, valid) < count.gather(1, group))


def contiguous(label: Tensor, length: Tensor) -> FrameWindows:
    """Make clusters of steps contiguous.

    From left to right, a run of equal labels that is shorter than the longest run of its label, or has a label that
    occurs once, takes the label of the longer of its neighbours, the left one on a tie; runs grow by those that join
    them. Windows are the resulting runs.

    Parameters
    ----------
    label : Tensor
        [B, T] long, cluster of each step.
    length : Tensor
        [B] long, steps of each video.
    """
    runs = _runs(label, length)
    name, size = label.gather(1, runs.first), runs.length
    longest = torch.zeros_like(size).scatter_reduce_(1, name, size, "amax").gather(1, name)
    moves = ((size < longest) | (longest == 1)) & (size > 0)
    before, grown, behind = torch.zeros_like(size[:, 0]), torch.zeros_like(size[:, 0]), nn.functional.pad(size, (0, 1))
    # label on the left; labels of runs; runs that take the next one's label
    beside, taken_by_run, goes_on = torch.full_like(before, -1), [], []
    for run in range(label.shape[1]):
        own, right = size[:, run] + grown, behind[:, run + 1]
        to_left = moves[:, run] & (before >= right) & (before > 0)
        to_right = moves[:, run] & ~to_left & (right > 0)
        taken = torch.where(to_left, beside, name[:, run])
        before = torch.where(to_right, before, own + torch.where(taken == beside, before, 0))
        beside, grown = torch.where(to_right, beside, taken), torch.where(to_right, own, 0)
        taken_by_run.append(taken)
        goes_on.append(to_right)
    for run in reversed(range(len(taken_by_run) - 1)):
        taken_by_run[run] = torch.where(goes_on[run], taken_by_run[run + 1], taken_by_run[run])
    return _runs(torch.stack(taken_by_run, 1).gather(1, runs.number), length)


def _runs(label: Tensor, length: Tensor) -> FrameWindows:
    """Cut videos into runs of equal labels [B, T]."""
    return FrameWindows.of(nn.functional.pad(label[:, 1:] != label[:, :-1], (1, 0), value=True), length)
