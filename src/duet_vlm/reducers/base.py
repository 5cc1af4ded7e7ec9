"""The base of all methods. Methods decide; they never see a model, a mask, a cache or a label.

An *encoder reducer* (``reducers.encoder``) turns the visual tokens of each span into fewer before the decoder; a
*decoder reducer* (``reducers.decoder``) keeps or drops visual tokens between decoder layers. A method is one frozen
dataclass that implements one or both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from duet_vlm.planning.budget import Budget, SpanPlan
from duet_vlm.reducers.calibration import Calibration
from duet_vlm.reducers.encoder_view import Layer
from duet_vlm.reducers.inputs import ATTENTION_INPUTS, TEXT_QUERY_INPUTS, Input
from duet_vlm.reducers.scoring import ScoringRules
from duet_vlm.utils.field_types import check_names, check_type

POSITIONS = ("keep", "compact")
ROUNDINGS = ("floor", "int", "round")


@dataclass(frozen=True)
class Reducer(ABC):
    """Base of all methods. Settings are fields; ``plan`` turns a budget or the settings into exact counts.

    Fields hold plain Python values (numbers of numpy become Python's), and those annotated as int, float or bool
    nothing else: a TypeError otherwise. A subclass with checks of its own calls ``super().__post_init__()`` first.

    Attributes
    ----------
    positions : str
        "keep": survivors keep their original position; "compact": positions are renumbered after every reduction.
    protect_predicting_tokens : bool
        A visual row whose logits predict text (the last row of a prompt that ends in an image; in training, one in
        front of a label) never leaves the sequence. It counts: one that the method had left out comes on top of its
        plan. False: it leaves like any other (released code).
    small_image_tokens : int
        Spans of fewer visual tokens than this (inside the tower: crops and frames) that a fractional budget cannot be
        met on are reduced to the method's floor instead of an error; 0: always an error.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[bool] = False  # a reference of evaluations: run by its name, not listed among the methods

    requires: ClassVar[frozenset[Input]] = frozenset()  # made for the method, nothing else is
    available: ClassVar[frozenset[Input]] = frozenset()  # of a contract: what it can make

    # Neutral values: a method that differs has its own, or a setting of the same name (no annotation here, or it would
    # be one everywhere).
    compares_frames: ClassVar[bool] = False  # compares frames, so "auto" never takes them apart
    # compares the same places of frames, so nothing may narrow a clip before it
    compares_positions: ClassVar[bool] = False
    # then ``tower_reducer`` says what does (``duet_vlm.reducers.vision_tower``)
    reduces_in_tower: ClassVar[bool] = False
    merges: ClassVar[bool] = False  # ``prune_tokens`` returns selections
    score_layer_offset: ClassVar[int] = 0  # how many layers before the drop the score is taken
    cls_token = False
    crops = "joint"
    newline_tokens = "drop"
    text_query = "all"
    training_turns = "first"
    multi_image = "joint"
    trim_kv_cache = False

    positions: str = "keep"
    protect_predicting_tokens: bool = True
    small_image_tokens: int = 64

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, check_type(each.name, each.type, getattr(self, each.name)))
        available = frozenset[Input]().union(*(vars(base).get("available", ()) for base in type(self).__mro__))
        if unknown := [need for need in self.requires if need not in available]:
            names = ", ".join(sorted(need.value if isinstance(need, Input) else repr(need) for need in unknown))
            known = ", ".join(sorted(f"Input.{need.name}" for need in available)) or "nothing"
            raise ValueError(f"{type(self).__name__}.requires names {names}: choose from {known}")
        check_choice("positions", self.positions, POSITIONS)
        if self.small_image_tokens < 0:
            raise ValueError(
                f"small_image_tokens={self.small_image_tokens}: a number of visual tokens, at least 0 (0 clamps nothing)"
            )

    @abstractmethod
    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        """Exact counts for a span of ``tokens`` in a decoder of ``depth`` layers; raises ``BudgetError`` below the
        floor."""

    def settings(self) -> dict[str, object]:
        """Every field with its value."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def signal_layers(self) -> tuple[Layer, ...]:
        """The vision layers whose signals the method is given: numbers, shares of the tower's depth (0.25: the last
        layer of its first quarter), or None for the family's own."""
        return ()

    @property
    def signal_queries(self) -> int | None:
        """The number of rows whose attention ranks tokens where the tower has no CLS row; None: all."""
        return None

    @property
    def tower_reducer(self) -> Reducer | None:
        """The method, of those that this one is made of, that reduces inside the vision tower
        (``vision_tower.tower_of`` has its type)."""
        return None

    @property
    def trained_reducer(self) -> Reducer | None:
        """The method, of those that this one is made of, whose module makes the rows (``compressor.compressor_of`` has
        its type)."""
        return None

    def plan_after_tower(self, tokens: int, depth: int, budget: Budget | None, left: int) -> SpanPlan:
        """``plan`` of a span of which a threshold in the tower left ``left`` tokens."""
        return self.plan(tokens, depth, budget)

    def scoring_rules(self) -> ScoringRules:
        """Rules by which signals and scores are made for the method."""
        return ScoringRules()

    def calibration(self) -> Calibration | None:
        """The calibration file of the method's settings, which must belong to the model that it is attached to."""
        return None

    def extra_stages(self, depth: int) -> frozenset[int]:
        """Layers before which ``prune_tokens`` is called even where the plan drops nothing: to reorder, or to observe."""
        return frozenset()

    def uses_text_queries(self) -> bool:
        """True if text queries are made for the method."""
        return bool(self.requires & TEXT_QUERY_INPUTS)

    def uses_attention(self) -> bool:
        """True if queries or keys of a decoder layer are made for the method."""
        return bool(self.requires & ATTENTION_INPUTS)


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
