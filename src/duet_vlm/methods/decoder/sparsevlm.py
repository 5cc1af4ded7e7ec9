"""SparseVLM: drop in stages inside the decoder by the attention of visual words, and recycle a part as cluster means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from duet_vlm.ops.dpc_knn import peaks
from duet_vlm.ops.ragged import gather_rows, pack_right, upload
from duet_vlm.ops.select import ranking, ranks, top
from duet_vlm.planning.budget import Schedule, count_of, largest_int
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.decoder import DecoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.scheduled import ScheduledReducer
from duet_vlm.reducers.scoring import ScoringRules
from duet_vlm.utils.field_types import check_choice

RELEASED = {  # tokens kept at each stage, of 576
    "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
LAYERS = (3, 7, 16)
HEADS = 14


@register("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(ScheduledReducer):
    """SparseVLM (ICML 2025, arXiv 2410.04417): words that the picture shows rate its tokens; of those that leave, the
    better ones are recycled.

    Raters are the text tokens that the visual ones resemble more than the average one, found once from the embeddings.
    At each stage the tokens stay that get most attention from raters in the layer before. Of d others the best int(0.3
    d) + 1 are clustered around the density peaks of their hidden states, about ten in a cluster, and each cluster goes
    on as its mean at the place of its centre.

    Parameters beyond ``ScheduledReducer`` (stages before layers 3, 7 and 16 of 32, which keep 0.54, 0.35 and 0.2)
    ----------
    recycle : bool
        False: the others only leave (second release).
    best_heads : int or None
        Attention is the mean over so many heads, those that attend most to visual tokens at that stage (second release:
        14), or over all (None); never more than there are.
    released : bool
        A stage's number counts those that are kept; recycled ones come on top and stand behind them, and one token at
        least is no longer kept.
    score_positions : str
        "as_is", or "divided": attention divided by what positions alone would give (the product of rotated ones, as the
        second release does; positions so far apart that this is not positive count as the nearest that small).

    Cost: one key projection and the raters' query rows per stage, distances among 0.3 of the tokens that leave. Needs
    text after the image. Usable in training (the choice carries no gradient, recycled rows do).

    Differences from the authors' code (Gumpest/SparseVLMs): numbers of tokens that go on are exact, recycled rows stand
    at their centre's position, no random noise decides among equal densities (the earlier row is denser), any image
    place, number, batch and depth. ``SparseVLM.official`` has their counts, order and positions, of version "1.5" or
    "2.0".
    """

    paper = "SparseVLM, ICML 2025, arXiv 2410.04417"
    summary = "drop in stages inside the decoder by attention from visual words, and recycle a part of what leaves as cluster means"
    paper_schedule: ClassVar[Schedule] = ((3, 0.54), (7, 0.35), (16, 0.2))
    score_layer_offset = 1
    requires = frozenset({Input.SCORES, Input.HIDDEN_STATES})
    merges = True

    default_options = TokenOptions(text_query="raters")
    recycle: bool = True
    best_heads: int | None = None
    released: bool = False
    score_positions: str = "as_is"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best_heads is not None and self.best_heads < 1:
            raise ValueError(f"best_heads={self.best_heads}: a number of heads, at least 1, or None for all")
        check_choice("score_positions", self.score_positions, ("as_is", "divided"))

    @classmethod
    def official(cls, tokens: int = 192, version: str = "1.5", **fields: Any) -> SparseVLM:
        """Return the released counts for nominally ``tokens`` of 576.

        Version "2.0" recycles nothing, keeps positions and averages the best 14 heads.
        """
        check_choice("version", version, tuple(RELEASED))
        check_choice("tokens", str(tokens), tuple(map(str, RELEASED[version])))
        counts: dict[str, Any] = {"schedule": tuple(zip(LAYERS, RELEASED[version][tokens], strict=True))}
        counts |= {"relative": "current", "released": True}
        if version == "1.5":
            return cls.from_preset(TokenOptions(positions="compact", protect_predicting_tokens=False), fields, **counts)
        second: dict[str, Any] = {"recycle": False, "best_heads": HEADS, "score_positions": "divided"}
        return cls.from_preset(TokenOptions(protect_predicting_tokens=False), fields, **counts, **second)

    def extra_stages(self, depth: int) -> frozenset[int]:
        """With ``released``, stages that only reorder: a single recycled token moves after the kept ones, and none is
        dropped.
        """
        return frozenset(layer for layer, _ in self.schedule or () if self.released and self.recycle)

    def _counts(self, tokens: int, depth: int, schedule: Schedule) -> tuple[int, ...]:
        counts = super()._counts(tokens, depth, schedule)
        if not self.released:
            return counts
        counts = (tokens,) * depth
        for layer, keep in schedule:
            there = counts[layer]
            kept = max(min(count_of(keep, tokens if self.relative == "entry" else there, self.rounding), there - 1), 0)
            gone_on = kept + (_clusters(there - kept) if self.recycle else 0)
            counts = counts[:layer] + (min(gone_on, there),) * (depth - layer)
        return counts

    def scoring_rules(self) -> ScoringRules:
        return ScoringRules(score_heads="each", score_positions=self.score_positions)

    def prune_tokens(self, view: DecoderView) -> Tensor | Selection:
        scores, valid = self._mean(view.require(Input.SCORES), view.valid), view.valid
        if not self.recycle:
            return top(scores, valid, view.num_keep)
        split = [self._split(there, stay) for there, stay in view.host_counts]
        kept, pool, clusters = upload(split, scores.device).T
        order = ranking(scores, valid)
        width, most = (max(1, *(row[i] for row in split)) for i in (1, 2))
        turn = torch.arange(width, device=scores.device)
        members, real = order.gather(1, (kept[:, None] + turn).clamp(max=order.shape[1] - 1)), turn < pool[:, None]
        chosen, nearest, peak = peaks(
            gather_rows(view.require(Input.HIDDEN_STATES), members), real, clusters, most, capped=True
        )
        index = pack_right(ranks(order) < kept[:, None], max(stay for _, stay in view.host_counts))[0]
        row = torch.arange(index.shape[1], device=index.device).expand_as(index)
        behind = peak.argsort(dim=1).gather(1, (row - kept[:, None]).clamp(0, width - 1))
        index = torch.where(row < kept[:, None], index, members.gather(1, behind))
        into = kept[:, None] + peak.gather(1, nearest)
        joins = real & ~chosen & (clusters > 0)[:, None]
        valid = row < (kept + clusters)[:, None]
        if not self.released:  # in order, each at its own place
            places = index.masked_fill(~valid, scores.shape[1]).argsort(dim=1)
            index, into = index.gather(1, places), ranks(places).gather(1, into.clamp(max=index.shape[1] - 1))
        return Selection(index, valid, members, torch.where(joins, into, -1))

    def _mean(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Average the attention over all or the best heads: [B, V, H] -> [B, V]."""
        if self.best_heads is None or self.best_heads >= scores.shape[2]:
            return scores.mean(2)
        seen = (scores * valid[..., None]).sum(1)
        best = ranking(seen, torch.ones_like(seen, dtype=torch.bool))[:, : self.best_heads]
        return scores.gather(2, best[:, None].expand(-1, scores.shape[1], -1)).mean(2)

    def _split(self, there: int, stay: int) -> tuple[int, int, int]:
        """Split ``there`` tokens so that ``stay`` remain: how many are kept, how many clustered, and into how many
        clusters.
        """
        if there == stay and not self.released:
            return stay, 0, 0
        kept = largest_int(stay, lambda k: k + _clusters(there - k) <= stay)
        named = [min(keep, there - 1) for _, keep in self.schedule or () if self.released]
        if kept not in named and kept - 1 in named and kept - 1 + _clusters(there - kept + 1) == stay:
            kept -= 1  # two numbers may give the same count: prefer the one in the schedule
        kept = max(kept, min(stay, 1))
        return kept, min(_recycled(there - kept), there - kept), min(stay - kept, _clusters(there - kept))


def _recycled(dropped: int) -> int:
    return int(0.3 * dropped) + 1


def _clusters(dropped: int) -> int:
    """Number of clusters of the recycled part of ``dropped`` tokens."""
    return _recycled(dropped) // 10 + 1
