"""Building blocks of ``custom``: scorers, selectors, mergers and schedules by name, each with its inputs. The rules
themselves are in ``ops``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from duet_vlm.ops import groups, saliency, schedules
from duet_vlm.ops.dpc_knn import distances, peak_scores
from duet_vlm.ops.duplicates import remove_duplicates
from duet_vlm.ops.graph import independent_set, rescaled
from duet_vlm.ops.greedy import (
    conditional_kernel,
    cosine,
    greedy_coverage,
    greedy_discounted,
    greedy_dpp_map,
    greedy_nms,
    max_min_diversity,
    pairwise_distance,
)
from duet_vlm.ops.merge_targets import (
    duet_contextual_count,
    merge_around_anchors,
    merge_dpc_clusters,
    merge_if_similar,
    merge_into_nearest,
    visionzip_contextual_count,
)
from duet_vlm.ops.neighbor_merge import merge_with_neighbours
from duet_vlm.ops.ragged import pack_right, upload
from duet_vlm.ops.select import ranking, spaced_picks, top
from duet_vlm.planning.budget import EPSILON, Schedule, check_schedule
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.utils.field_types import check_choice

CLOSEST = 5  # neighbours that make the density of a token
STRETCHES = 16  # of a picture, HoloV's
TAKEN = 32  # tokens that a chosen one takes in, PruMerge's


class BlockSettings(Protocol):
    """Settings of the method that blocks read (``custom``)."""

    @property
    def alpha(self) -> float: ...
    @property
    def alike(self) -> float: ...
    @property
    def important(self) -> float: ...
    @property
    def pool(self) -> float | None: ...
    @property
    def ridge(self) -> float: ...
    @property
    def tau(self) -> float: ...
    @property
    def window(self) -> int: ...


@dataclass(frozen=True)
class ChoiceState:
    """A choice on its way, what selectors and mergers look at: ``weight`` [B, N], the scores, not negative; ``shown``
    [B, N, d], the rows whose likeness counts, None where nobody compares."""

    view: EncoderView
    settings: BlockSettings
    weight: Tensor
    shown: Tensor | None

    @property
    def rows(self) -> Tensor:
        assert self.shown is not None  # as somebody compares
        return self.shown

    @cached_property
    def table(self) -> Tensor:
        """Cosines of all pairs [B, N, N]."""
        return cosine(self.rows, self.view.valid)

    @property
    def steps(self) -> int:
        """The most tokens that are chosen of a picture."""
        return max(plan.dominant for plan in self.view.plans)

    @property
    def left(self) -> int:
        """The most tokens that are not chosen of a picture."""
        return max(plan.tokens - plan.dominant for plan in self.view.plans)

    def counts(self, numbers: list[int]) -> Tensor:
        """A number for each picture, on the device [B]."""
        return upload(numbers, self.view.valid.device)


# ---- scorers


@dataclass(frozen=True)
class Scorer:
    """``score`` of each token [B, N], larger is better. ``rows`` that it reads: "" none, "features", or "projected";
    ``scale``: how the score becomes a weight unless the settings say otherwise, with ``offset`` where it is a range."""

    score: Callable[[EncoderView], Tensor]
    requires: frozenset[Input] = frozenset()
    rows: str = ""
    scale: str = "none"
    offset: float = 0.0


def _asked(view: EncoderView) -> Tensor:
    question = view.require(Input.QUESTION)
    return saliency.relevance(view.require(Input.FEATURES), question.embeddings, question.valid)


def _dense(view: EncoderView) -> Tensor:
    return peak_scores(
        distances(view.require(Input.FEATURES).masked_fill(~view.valid[..., None], 0)), view.valid, CLOSEST
    )


def _moved(view: EncoderView) -> Tensor:
    return saliency.sensitivity(view.require(Input.PROJECTOR))


SCORERS: dict[str, Scorer] = {
    "importance": Scorer(lambda view: view.require(Input.IMPORTANCE), requires=frozenset({Input.IMPORTANCE})),
    "uniform": Scorer(lambda view: view.valid.float()),
    "relevance": Scorer(
        _asked, requires=frozenset({Input.QUESTION}), rows="projected", scale="range", offset=saliency.OFFSET
    ),
    "sensitivity": Scorer(_moved, requires=frozenset({Input.PROJECTOR}), rows="projected", scale="range"),
    "key_norm": Scorer(
        lambda view: -saliency.length(view.require(Input.KEYS)), requires=frozenset({Input.KEYS}), scale="range"
    ),
    "feature_norm": Scorer(lambda view: saliency.length(view.require(Input.FEATURES)), rows="features"),
    "contrast": Scorer(lambda view: saliency.contrast(view.require(Input.FEATURES), view.valid), rows="features"),
    "density": Scorer(_dense, rows="features"),
}


# ---- selectors


@dataclass(frozen=True)
class Selector:
    """``choose`` the tokens [B, N] bool, ``view.dominant`` of each picture; whether it looks at scores, and at
    likeness; what else it reads."""

    choose: Callable[[ChoiceState], Tensor]
    scores: bool = True
    compares: bool = False
    requires: frozenset[Input] = frozenset()


def _windows(c: ChoiceState) -> Tensor:
    """Windows of a grid in proportion to their tokens, the best of each."""
    view, most = c.view, c.view.valid.shape[1]
    (place, sides, _), parts = view.require(Input.GRID), view.require_parts()
    window, _ = groups.window_numbers(place, sides, torch.where(view.valid, parts, -1), c.settings.window, most)
    group = groups.numbered(window, view.valid)
    size = groups.sums_of_groups(view.valid, group, view.valid, most).long()
    return groups.top_of_groups(c.weight, group, view.valid, groups.equal_shares(size, view.dominant), view.dominant)


def _stretches(c: ChoiceState) -> Tensor:
    """Stretches of the raster order in proportion to their mean score, the best of each."""
    view, stretch = c.view, groups.segment_numbers(c.view.valid, STRETCHES)
    size, total = (groups.sums_of_groups(x, stretch, view.valid, STRETCHES) for x in (view.valid, c.weight))
    quota = groups.proportional_shares(total / size.clamp(min=1), size, view.dominant)
    return groups.top_of_groups(c.weight, stretch, view.valid, quota, view.dominant)


def _determinantal(c: ChoiceState) -> Tensor:
    return greedy_dpp_map(
        conditional_kernel(c.table, c.weight, c.settings.ridge), c.view.valid, c.view.dominant, c.steps
    )


def _graph(c: ChoiceState) -> Tensor:
    joined = rescaled(c.table, c.view.valid) > c.settings.alike
    steps = max(plan.dominant - int(plan.dominant * c.settings.important) for plan in c.view.plans)
    return independent_set(c.weight, joined, c.view.valid, c.view.dominant, c.settings.important, steps)


def _distinct(c: ChoiceState) -> Tensor:
    return remove_duplicates(
        c.table, c.weight, c.view.valid, [(plan.tokens, plan.dominant) for plan in c.view.plans], c.settings.important
    )


SELECTORS = {
    "top": Selector(lambda c: top(c.weight, c.view.valid, c.view.dominant)),
    "even": Selector(lambda c: spaced_picks(c.view.valid, c.view.dominant), scores=False),
    "windows": Selector(_windows, requires=frozenset({Input.GRID})),
    "stretches": Selector(_stretches),
    "nms": Selector(
        lambda c: greedy_nms(c.table, c.weight, c.view.valid, c.view.dominant, c.steps, c.settings.alike), compares=True
    ),
    "graph": Selector(_graph, compares=True),
    "distinct": Selector(_distinct, compares=True),
    "max_min": Selector(
        lambda c: max_min_diversity(c.table, c.view.valid, c.view.dominant, c.steps), scores=False, compares=True
    ),
    "apart": Selector(
        lambda c: pairwise_distance(c.table, c.weight, c.view.valid, c.view.dominant, c.steps), compares=True
    ),
    "determinantal": Selector(_determinantal, compares=True),
    "coverage": Selector(
        lambda c: greedy_coverage(c.table, c.weight, c.view.valid, c.view.dominant, c.steps), compares=True
    ),
    "discount": Selector(
        lambda c: greedy_discounted(c.table.clamp(min=0), c.weight, c.view.valid, c.view.dominant, c.steps),
        compares=True,
    ),
}


# ---- mergers


@dataclass(frozen=True)
class Merger:
    """``merge`` the tokens that were not chosen ([B, N] bool are the chosen ones); whether it looks at scores, and at
    likeness; ``own``: how many of the rows that enter, of a picture of how many tokens, it makes of these alone."""

    merge: Callable[[ChoiceState, Tensor], Selection]
    scores: bool = False
    compares: bool = True
    own: Callable[[int, int], int] = lambda entry, tokens: 0


def _kept(c: ChoiceState, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return pack_right(chosen, c.steps)


def _close(c: ChoiceState, chosen: Tensor) -> Selection:
    rest, share = c.view.valid & ~chosen, 0.5 if c.settings.pool is None else c.settings.pool
    pools = [math.floor(share * plan.dominant + EPSILON) for plan in c.view.plans]
    members, offered = ranking(c.weight, rest)[:, : max(pools)], torch.minimum(c.counts(pools), rest.sum(1))
    return merge_if_similar(*_kept(c, chosen), members, offered, c.table, c.settings.tau)


def _local(c: ChoiceState, chosen: Tensor) -> Selection:
    rest, share = c.view.valid & ~chosen, 4.0 if c.settings.pool is None else c.settings.pool
    pools = [math.ceil(share * plan.contextual - EPSILON) for plan in c.view.plans]
    order, pool = ranking(c.weight, rest)[:, : max(1, *pools)], torch.minimum(c.counts(pools), rest.sum(1))
    return merge_around_anchors(
        *_kept(c, chosen), order, pool, c.view.contextual, max(plan.contextual for plan in c.view.plans), c.rows
    )


def _spaced(c: ChoiceState, chosen: Tensor) -> Selection:
    rest, width = c.view.valid & ~chosen, max(plan.contextual for plan in c.view.plans)
    order, _ = pack_right(rest, max(1, c.left))
    return merge_around_anchors(*_kept(c, chosen), order, rest.sum(1), c.view.contextual, width, c.rows)


def _peaks(c: ChoiceState, chosen: Tensor) -> Selection:
    rest, width = c.view.valid & ~chosen, max(plan.contextual for plan in c.view.plans)
    return merge_dpc_clusters(*_kept(c, chosen), rest, c.left, c.view.contextual, width, c.rows, CLOSEST)


def _neighbours(c: ChoiceState, chosen: Tensor) -> Selection:
    index, valid = _kept(c, chosen)
    return merge_with_neighbours(index, index, valid, c.view.valid, c.view.contextual, c.weight, c.rows, TAKEN)


def _nearest(c: ChoiceState, chosen: Tensor, weight: Tensor | None = None) -> Selection:
    return merge_into_nearest(*_kept(c, chosen), c.view.valid & ~chosen, c.left, c.rows, weight)


MERGERS = {
    "none": Merger(lambda c, chosen: Selection.keep_only(*_kept(c, chosen)), compares=False),
    "nearest": Merger(_nearest),
    "weighted": Merger(lambda c, chosen: _nearest(c, chosen, c.weight), scores=True),
    "close": Merger(_close, scores=True),
    "local": Merger(_local, scores=True, own=duet_contextual_count),
    "spaced": Merger(_spaced, own=lambda entry, tokens: visionzip_contextual_count(entry)),
    "peaks": Merger(_peaks, own=duet_contextual_count),
    "neighbours": Merger(_neighbours, scores=True, own=lambda entry, tokens: int(entry > 1)),
}


# ---- schedules: of a decoder's depth and the share of its tokens that a budget leaves a picture (None: no budget)

SCHEDULES: dict[str, Callable[[int, float | None], Schedule]] = {
    "duet": lambda depth, share: schedules.duet_schedule(depth),
    "pyramid": lambda depth, share: schedules.pyramid(depth),
    "halfway": lambda depth, share: schedules.halfway(depth),
    "tapered": schedules.tapered_schedule,
}


def checked_schedule(schedule: Schedule | str) -> Schedule | str:
    """Drops as sorted tuples, or the name of a schedule; "none" is no drops."""
    if not isinstance(schedule, str):
        return check_schedule(schedule)
    check_choice("schedule", schedule, ("none", *SCHEDULES))
    return () if schedule == "none" else schedule


# ---- together

CHOICES: dict[str, tuple[Any, ...]] = {  # what the settings that name something may say
    "scorer": tuple(SCORERS), "selector": tuple(SELECTORS), "merger": tuple(MERGERS), "compare": ("features", "projected", "keys"),
    "scale": (None, "none", "largest", "range"),
}  # fmt: skip


@dataclass(frozen=True)
class Blocks:
    """A scorer, a selector and a merger, and what they need; ``compare`` and ``scale`` as ``custom`` has them."""

    scorer: Scorer
    selector: Selector
    merger: Merger
    compare: str
    scale: str

    @classmethod
    def named(cls, scorer: str, selector: str, merger: str, compare: str, scale: str | None) -> Blocks:
        """By their names; where nobody looks at scores all tokens are the same, and where nobody looks at likeness
        nothing is compared."""
        select, merge = SELECTORS[selector], MERGERS[merger]
        score = SCORERS[scorer if select.scores or merge.scores else "uniform"]
        return cls(
            score,
            select,
            merge,
            compare if select.compares or merge.compares else "",
            score.scale if scale is None else scale,
        )

    @property
    def requires(self) -> frozenset[Input]:
        """The inputs of the scorer, the selector and the rows that are compared."""
        keys = {Input.KEYS} if self.compare == "keys" else set()
        features = {Input.PROJECTED_FEATURES} if "projected" in self.rows else {Input.FEATURES} if self.rows else set()
        return self.scorer.requires | self.selector.requires | keys | features

    @property
    def rows(self) -> frozenset[str]:
        """The rows behind the tower that somebody looks at: "features", "projected"."""
        return frozenset({self.scorer.rows, self.compare} - {"", "keys"})

    def weight(self, view: EncoderView, alpha: float) -> Tensor:
        """Scores as weights to the power ``alpha``, not negative, 0 for padding: [B, N]."""
        score = self.scorer.score(view)
        if self.scale == "largest":
            return saliency.of_largest(score, view.valid, alpha)
        if self.scale == "range":
            score = saliency.min_max_scaled(score, view.valid, self.scorer.offset)
        return (score**alpha).masked_fill(~view.valid, 0.0)

    def selection(self, view: EncoderView, settings: BlockSettings) -> Selection:
        """Scored, selected, merged."""
        rows = view.keys if self.compare == "keys" else view.features
        choosing = ChoiceState(view, settings, self.weight(view, settings.alpha), rows)
        return self.merger.merge(choosing, self.selector.choose(choosing))
