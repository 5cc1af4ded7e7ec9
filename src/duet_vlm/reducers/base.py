"""The two contracts a method can meet, and what it may look at. Methods decide; they never see a model, a mask, a cache or a label.

An *encoder reducer* turns the visual tokens of each span into fewer rows before the decoder (V2V); a *decoder reducer* says which
visual tokens stay at a drop inside the decoder (T2V). A method is one frozen dataclass that implements one or both.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, ClassVar

from torch import Tensor

from duet_vlm.planning.budget import (
    EPSILON,
    Budget,
    BudgetError,
    Keep,
    NoBudget,
    Schedule,
    SpanPlan,
    check_budget,
    count_of,
    infeasible_budget,
    largest_fraction,
    largest_int,
    layer_counts,
    mean_within,
    target_mean,
)
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.calibration import Calibration
from duet_vlm.reducers.decoder_view import NEEDS
from duet_vlm.reducers.decoder_view import DecoderView as DecoderView
from duet_vlm.reducers.encoder_view import READS, SIGNALS, Layer
from duet_vlm.reducers.encoder_view import EncoderView as EncoderView
from duet_vlm.utils.field_types import check_names, check_type

POSITIONS = ("keep", "compact")
TEXT_QUERIES = ("all", "last", "salient", "raters")
TRAINING_TURNS = ("first", "all")
SCORE_MASKS = ("causal", "none")
MULTI_IMAGE = ("joint", "per_image")
CROPS = ("auto", "joint", "per_crop")
NEWLINES = ("drop", "keep")
QUERIES = 256  # rows of a picture that rank its tokens where the tower has no CLS row
HEADS = ("each", "one")
SCORE_POSITIONS = ("as_is", "divided")
PROBES = ("next", "last")
ROUNDINGS = ("floor", "int", "round")


@dataclass(frozen=True)
class Reducer(ABC):
    """Base of all methods. Settings are fields; ``plan`` turns a budget or the settings into exact counts.

    Fields hold plain Python values (numbers of numpy become Python's), and those annotated as int, float or bool nothing else: a
    TypeError otherwise. A subclass with checks of its own calls ``super().__post_init__()`` first.

    Attributes
    ----------
    positions : str
        "keep": survivors keep their original position; "compact": positions are renumbered after every reduction.
    protect_predicting_tokens : bool
        A visual row whose logits predict text (the last row of a prompt that ends in an image; in training, one in front of a label) never
        leaves the sequence. It counts: one that the method had left out comes on top of its plan. False: it leaves like any other (released
        code).
    small_image_tokens : int
        Spans of fewer visual tokens than this (inside the tower: crops and frames) that a fractional budget cannot be met on are reduced to the
        method's floor instead of an error; 0: always an error.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]

    positions: str = "keep"
    protect_predicting_tokens: bool = True
    small_image_tokens: int = 64

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, check_type(each.name, each.type, getattr(self, each.name)))
        check_choice("positions", self.positions, POSITIONS)
        if self.small_image_tokens < 0:
            raise ValueError(f"small_image_tokens={self.small_image_tokens}: a number of visual tokens, at least 0 (0 clamps nothing)")

    @abstractmethod
    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        """Exact counts for a span of ``tokens`` in a decoder of ``depth`` layers; raises ``BudgetError`` below the floor."""

    def settings(self) -> dict[str, object]:
        """Every field with its value."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class EncoderReducer(Reducer):
    """A method that reduces before the decoder.

    ``signals`` names what it needs of the vision layers in ``signal_layers`` (``duet_vlm.reducers.encoder_view.LayerView``), ``reads`` what it needs beside
    them (``EncoderView``): "grid", "question", "similar", "projector". With ``reads_projected`` it sees the rows as the decoder would get
    them, so that a point-wise projector runs on all of them. Without ``reads_features`` it chooses as soon as the signals are there, and
    nothing but its choice lives through the rest of the tower.

    Attributes
    ----------
    cls_token : bool
        Feed the tower's CLS row as a visual token, as the released code of DUET-VLM and VisionZip does. It counts in the dominant
        tokens; needs ``positions="compact"`` and a tower with a CLS row.
    signal_layer : int or None
        Vision layer whose attention is read; None leaves the choice to the model family.
    signal_segments : bool
        Keep the tower's own attention segments (images, frames, windows) when summing attention. False sums over everything in
        the call, as the released Qwen2.5-VL code does under sdpa.
    signal_queries : int or None
        Where the tower has no CLS row, tokens are ranked by the attention that they receive: from that many of its rows, spread over the grid
        of each picture or frame, or from all of them (None, as the released codes do). The sum costs as many rows times all.
    signal_heads : str
        "each": the attention of every head, added up, and keys as means over heads. "one": all heads side by side are read as a single wide
        one, as the released code of LLaVA-PruMerge does.
    crops : str
        "joint": all crops of an image or frames of a clip are reduced together; "per_crop": every one by itself, within one budget, and the
        method's own counts are per part; "auto": what the model family's documentation states.
    newline_tokens : str
        "drop": newline rows of packed crops leave first when their image is reduced; "keep": all of them enter, taken from the budget.
    """

    signals: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    reads_projected: ClassVar[bool] = False
    reads_features: ClassVar[bool] = True
    compares_frames: ClassVar[bool] = False  # compares frames, so "auto" never takes them apart
    compares_positions: ClassVar[bool] = False  # compares the same places of frames, so nothing may narrow a clip in front of it
    reduces_in_tower: ClassVar[bool] = False  # then ``tower`` says what does (``duet_vlm.reducers.vision_tower``)
    tower_reducer: ClassVar[EncoderReducer | None] = None

    cls_token: bool = False
    signal_layer: int | None = None
    signal_segments: bool = True
    signal_queries: int | None = QUERIES
    signal_heads: str = "each"
    crops: str = "auto"
    newline_tokens: str = "drop"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, named, known in (("signals", self.signals, SIGNALS), ("reads", self.reads, READS)):
            if unknown := sorted(named - set(known)):
                raise ValueError(f"{type(self).__name__}.{name} names {', '.join(unknown)}: choose from {', '.join(known)}")
        if self.signal_queries is not None and self.signal_queries < 1:
            raise ValueError(f"signal_queries={self.signal_queries}: a number of rows, at least 1, or None for all")
        check_choice("signal_heads", self.signal_heads, HEADS)
        check_choice("crops", self.crops, CROPS)
        check_choice("newline_tokens", self.newline_tokens, NEWLINES)
        if self.cls_token and self.positions != "compact":
            raise ValueError(f"cls_token=True needs positions='compact' (the CLS row has no position of its own), got {self.positions!r}")
        if self.cls_token and self.reads_projected:
            raise ValueError(f"cls_token=True cannot work with {self.name}: it reads projected rows, and the CLS row is not projected")
        if self.cls_token and getattr(self, "dominant", None) == 0:
            raise ValueError("cls_token=True with dominant=0: the CLS row counts as a dominant token, give dominant >= 1")

    def plan_entry(self, tokens: int, budget: Budget, depth: int = 32) -> SpanPlan:
        """The plan of a span of which ``budget`` tokens (or that fraction of them, at least one) enter the decoder and stay: what the method's
        first stage does where nothing is dropped inside the decoder.

        Parameters
        ----------
        tokens : int
            Of the span.
        depth : int
            Of the decoder in which the method divides its rows into dominant and contextual ones.

        Raises
        ------
        ValueError
            As ``plan``; a ``BudgetError`` where the method cannot do with so few.
        """
        wanted = max(1, math.floor(target_mean(budget, tokens) + EPSILON))
        if wanted >= tokens:
            return plan_keep_all(tokens, depth)

        def fits(share: float) -> bool:
            try:
                return self.plan(tokens, depth, share).entry <= wanted
            except BudgetError as error:
                if error.floor is None:
                    raise
                return True  # less than the method's floor

        share = largest_fraction(fits)
        plan = self.plan(tokens, depth, share or sys.float_info.min)  # raises where not even the smallest share fits
        return replace(plan, counts=(plan.entry,) * depth)

    @property
    def signal_layers(self) -> tuple[Layer, ...]:
        """The vision layers that are read: numbers, shares of the tower's depth (0.25: the last layer of its first quarter), or None for the
        family's own."""
        return (self.signal_layer,)

    @property
    def trained_reducer(self) -> EncoderReducer | None:
        """The method, of those that this one is made of, whose module makes the rows (``duet_vlm.reducers.compressor``)."""
        return None

    def plan_after_tower(self, tokens: int, depth: int, budget: Budget | None, left: int) -> SpanPlan:
        """``plan`` of a span of which a threshold in the tower left ``left`` tokens."""
        return self.plan(tokens, depth, budget)

    @abstractmethod
    def select_tokens(self, view: EncoderView) -> Selection:
        """Which rows enter the decoder, and which tokens are merged into which row."""


@dataclass(frozen=True)
class DecoderReducer(Reducer):
    """A method that drops, or merges, visual tokens between decoder layers.

    ``uses_text``: it ranks by attention from text, taken ``score_layer_offset`` layers before the drop, ``score_heads`` "mean" over heads, their "max", the
    "most" of any head and query, or "each". ``score_states``: layers that have a state in place of attention rank by what text reads out of it
    (``Adapter.linear_attention_scores``); else the last attention before them does. ``needs`` names what else it looks at (``DecoderView``); only that is made.
    ``merges``: it merges rows.

    Attributes
    ----------
    text_query : str
        Which text rows rank the visual tokens: "all" after the last visual token, "last", "salient" words (needs the processor), or "raters": of
        all, those that the visual tokens resemble more than the average one (SparseVLM, arXiv 2410.04417, section 3.2).
    training_turns : str
        With labels, take the queries of the "first" turn only (later questions do not choose for earlier answers) or of "all".
    skip_unanswered : bool
        Leave samples without any supervised label whole (released DUET-VLM and PyramidDrop training code).
    score_mask : str
        "causal": a query sees what precedes it; "none": every row (released Qwen2.5-VL code of DUET-VLM).
    multi_image : str
        With several images (or clips) in a prompt, "joint": all their tokens are ranked together, so that an image that matters more to the
        text keeps more; their sum is what is planned (released code). "per_image": every image is ranked by itself and keeps its own share.
    score_positions : str
        "as_is", or "divided": attention divided by what positions alone would give (the product of rotated rows of ones, as SparseVLM's second
        release does; positions so far apart that this is not positive count as the nearest that small).
    trim_kv_cache : bool
        False: every layer keeps the keys and values of all that it read. True: once the prompt is read, those of visual tokens
        that did not reach the last layer are removed from the caches of earlier ones, too.
    probe : str
        What a gradient goes through: the "next" layer, the last norm and the head; or the "last" layer once more, with the input embeddings in place
        of the head (released Qwen2.5-VL code of PIO-FVLM).
    """

    uses_text: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()
    score_heads: ClassVar[str] = "mean"
    merges: ClassVar[bool] = False  # `prune_tokens` returns selections
    uses_tokens: ClassVar[bool] = False
    score_states: ClassVar[bool] = False
    score_layer_offset: ClassVar[int] = 0  # how many layers before the drop the score is taken

    text_query: str = "all"
    training_turns: str = "first"
    skip_unanswered: bool = False
    score_mask: str = "causal"
    multi_image: str = "joint"
    score_positions: str = "as_is"
    trim_kv_cache: bool = False
    probe: str = "next"

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := self.needs - set(NEEDS):
            raise ValueError(f"{self.name}: needs names {', '.join(sorted(unknown))}; known are {', '.join(NEEDS)}")
        check_choice("text_query", self.text_query, TEXT_QUERIES)
        check_choice("training_turns", self.training_turns, TRAINING_TURNS)
        check_choice("score_mask", self.score_mask, SCORE_MASKS)
        check_choice("multi_image", self.multi_image, MULTI_IMAGE)
        check_choice("score_positions", self.score_positions, SCORE_POSITIONS)
        check_choice("probe", self.probe, PROBES)

    def calibration(self) -> Calibration | None:
        """What it was told about a model by a file, which must then be the model that it is attached to."""
        return None

    @classmethod
    def uses_text_queries(cls) -> bool:
        """Whether text rows are looked at."""
        return cls.uses_text or bool(cls.needs & {"text_hidden_states", "keys", "positions"})

    @classmethod
    def uses_attention(cls) -> bool:
        """Whether queries or keys of a layer are made to decide."""
        return cls.uses_text or bool(cls.needs & {"keys", "visual_self_attention"})

    def with_paper_schedule(self, depth: int, share: float | None = None) -> DecoderReducer:
        """This method as a composition runs it in a decoder of ``depth`` layers: where its settings leave the drops to a budget, with those
        that its paper uses; ``share``: of a span's tokens, that the budget allows, where there is one."""
        return self

    def extra_stages(self, depth: int) -> frozenset[int]:
        """Layers in front of which it is asked (`prune_tokens`) even where its plan lets nobody leave there: to reorder, or to look."""
        return frozenset()

    @abstractmethod
    def prune_tokens(self, view: DecoderView) -> Tensor | Selection:
        """Mask [B, V] of the tokens that stay; exactly ``view.num_keep`` of each row's ``view.valid``. Or, where others are merged into these, a
        ``Selection`` of as many rows: they stand where the tokens stood that ``index`` names; with renumbered positions, in that order."""


def with_fields(method: type[Reducer] | Reducer, settings: dict[str, Any]) -> Reducer:
    """The method with these settings; an unknown one is a ValueError that lists those there are."""
    cls = method if isinstance(method, type) else type(method)
    known = [field.name for field in fields(cls)]
    check_names(cls.name, settings, known)
    return method(**settings) if isinstance(method, type) else replace(method, **settings)


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}")


def check_picks(picks: int) -> None:
    if picks < 1:
        raise ValueError(f"picks={picks}: how many tokens a greedy step chooses, at least 1")


def check_budget_or_fields(method: Reducer, budget: Budget | None, given: bool, example: str) -> None:
    """A method is set either by a budget or by its own fields, not by both and not by neither."""
    check_budget(budget)
    if budget is not None and given:
        raise ValueError(f"{method.name}: give either budget= or the method's own settings ({example}), not both")
    if budget is None and not given:
        raise NoBudget(f"{method.name} needs a budget (budget=64 tokens, budget=0.22 of the tokens) or its own settings ({example})", example)


def plan_or_clamp(reducer: Reducer, tokens: int, depth: int, budget: Budget | None, left: int | None = None) -> SpanPlan:
    """``reducer.plan``, but a small span that a fractional budget cannot be met on gets the method's floor (``Reducer.small_image_tokens``).

    ``left``: of the span, how many tokens a threshold in the tower left.

    A floor of one token is more than 5 % of ten tokens and less than 5 % of a hundred: an error there would end a whole batch for its
    smallest image. A floor that grows with the span (layers that run at full width) stays an error, as no image could meet the budget.

    Raises
    ------
    BudgetError
        As ``reducer.plan``, where the span is not small or a span on which the budget means ``small_image_tokens`` tokens is refused as well.
    """

    def solve(budget: Budget | None) -> SpanPlan:
        if left is None:
            return reducer.plan(tokens, depth, budget)
        assert isinstance(reducer, EncoderReducer)  # or no tower was reduced
        return reducer.plan_after_tower(tokens, depth, budget, left)

    try:
        return solve(budget)
    except BudgetError as error:
        if budget is None or isinstance(budget, Integral) or error.floor is None or tokens >= reducer.small_image_tokens:
            raise
        try:
            reducer.plan(math.ceil(reducer.small_image_tokens / budget), depth, budget)
        except BudgetError:
            raise error from None
        return replace(solve(error.floor / tokens), floored=True)


def plan_keep_all(tokens: int, depth: int) -> SpanPlan:
    """The plan that keeps every token."""
    return SpanPlan(tokens, tokens, 0, (tokens,) * depth)


def plan_fixed_count(method: Reducer, keep: Keep | None, tokens: int, depth: int, budget: Budget | None, rounding: str = "floor") -> SpanPlan:
    """The plan of a method that enters ``keep`` tokens of a span (a fraction rounded as ``count_of`` says), or as many as ``budget`` allows, and
    drops none later."""
    check_budget_or_fields(method, budget, keep is not None, "keep=")
    if budget is None:
        assert keep is not None  # just checked
        count = count_of(keep, tokens, rounding)
    else:
        target = target_mean(budget, tokens)
        count = math.floor(target + EPSILON)
        if count < 1:
            raise infeasible_budget(method.name, target, 1, tokens, "at least one token enters the decoder")
    return SpanPlan(tokens, count, 0, (count,) * depth)


def plan_with_schedule(method: Reducer, schedule: Schedule, tokens: int, depth: int, target: float) -> SpanPlan:
    """The largest entry whose mean under ``schedule`` (fractions) is within ``target``; every entering token counts as dominant.

    When even all tokens leave budget over, each stage keeps more: first the fractions of a larger number than there is, at last the stages
    that drop everything.
    """

    def counts(entry: int, end: int) -> tuple[int, ...]:
        kept = ((layer, min(count_of(keep, entry), tokens) if keep else end) for layer, keep in schedule)
        return layer_counts(min(entry, tokens), depth, tuple(kept))

    smallest = min((float(keep) for _, keep in schedule if keep), default=1.0)
    entry = largest_int(math.ceil(tokens / smallest), lambda n: mean_within(counts(n, 0), target))
    if entry < 1:
        floor = sum(counts(1, 0)) / depth
        raise infeasible_budget(method.name, target, floor, tokens, "at least one token enters the decoder")
    end = largest_int(tokens, lambda n: mean_within(counts(entry, n), target)) if entry >= tokens else 0
    entering = min(entry, tokens)
    return SpanPlan(tokens, entering, 0, counts(entry, end))
