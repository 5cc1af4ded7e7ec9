"""The base of all methods. Methods decide; they never see a model, a mask, a cache or a label.

An *encoder reducer* (``reducers.encoder``) turns the visual tokens of each span into fewer before the decoder; a
*decoder reducer* (``reducers.decoder``) keeps or drops visual tokens between decoder layers. A method is one frozen
dataclass that implements one or both.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

from duet_vlm.planning.budget import Budget, SpanPlan
from duet_vlm.reducers.calibration import Calibration
from duet_vlm.reducers.encoder_view import Layer
from duet_vlm.reducers.inputs import ATTENTION_INPUTS, TEXT_QUERY_INPUTS, Input
from duet_vlm.reducers.options import NAMES, TokenOptions
from duet_vlm.reducers.scoring import ScoringRules
from duet_vlm.utils.field_types import check_names, check_type
from duet_vlm.utils.renamed_settings import check_renamed

ROUNDINGS = ("floor", "int", "round")
NEUTRAL = TokenOptions(  # of a stage that a method does not have
    positions="keep",
    protect_predicting_tokens=True,
    small_image_tokens=64,
    cls_token=False,
    signal_layer=None,
    signal_queries=None,
    crops="joint",
    newline_tokens="drop",
    text_query="all",
    training_turns="first",
    skip_unanswered=False,
    multi_image="joint",
    trim_kv_cache=False,
    reentry="none",
    proportional_attention=True,
    pooled_context_tokens=0,
)


Method = TypeVar("Method", bound="Reducer")


@dataclass(frozen=True)
class Reducer(ABC):
    """Base of all methods. Settings are fields; ``plan`` turns a budget or the settings into exact counts.

    Fields hold plain Python values (numbers of numpy become Python's), and those annotated as int, float or bool
    nothing else: a TypeError otherwise. A subclass with checks of its own calls ``super().__post_init__()`` first.

    Attributes
    ----------
    options : TokenOptions
        How visual tokens are treated, complete: what was left out is the method's own default.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[bool] = False  # a reference of evaluations: run by its name, not listed among the methods

    requires: ClassVar[frozenset[Input]] = frozenset()  # made for the method, nothing else is
    available: ClassVar[frozenset[Input]] = frozenset()  # of a contract: what it can make

    option_names: ClassVar[frozenset[str]] = frozenset({"positions", "protect_predicting_tokens", "small_image_tokens"})
    """Options that a contract adds to those of its bases."""
    default_options: ClassVar[TokenOptions] = NEUTRAL
    """Defaults of a class in place of those of its bases."""

    compares_frames: ClassVar[bool] = False  # compares frames, so "auto" never takes them apart
    # compares the same places of frames, so nothing may narrow a clip before it
    compares_positions: ClassVar[bool] = False
    # then ``tower_reducer`` says what does (``duet_vlm.reducers.vision_tower``)
    reduces_in_tower: ClassVar[bool] = False
    merges: ClassVar[bool] = False  # ``prune_tokens`` returns selections
    score_layer_offset: ClassVar[int] = 0  # how many layers before the drop the score is taken
    options: TokenOptions = TokenOptions()

    def __new__(cls: type[Method], *args: Any, **settings: Any) -> Method:
        own, name = [each.name for each in fields(cls)], getattr(cls, "name", cls.__name__)
        if taken := [each for each in own if each in NAMES]:
            raise TypeError(
                f"{name}: {taken[0]} is an option of methods, a field of that name has no effect: write "
                f"default_options = TokenOptions({taken[0]}=...) in place of it"
            )
        # Python would say of an old name that it is unexpected, and not what it is called today
        check_renamed(name, settings, own)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, check_type(each.name, each.type, getattr(self, each.name)))
        available = frozenset[Input]().union(*(vars(base).get("available", ()) for base in type(self).__mro__))
        if unknown := [need for need in self.requires if need not in available]:
            names = ", ".join(sorted(need.value if isinstance(need, Input) else repr(need) for need in unknown))
            there = ", ".join(sorted(f"Input.{need.name}" for need in available)) or "nothing"
            raise ValueError(f"{type(self).__name__}.requires names {names}: choose from {there}")
        given, usual, known = TokenOptions.of(self.options), self.usual_options(), self.known_options()
        for name, value in given.given().items():
            if name not in known and value != getattr(usual, name):
                raise ValueError(
                    f"{self.name}: options.{name}={value!r} concerns a stage that {self.name} does not have; its options: "
                    f"{', '.join(known)}"
                )
        object.__setattr__(self, "options", usual.overlaid(given))

    @classmethod
    def from_preset(cls: type[Method], options: TokenOptions, given: Mapping[str, Any], **settings: Any) -> Method:
        """The method as published: with these options and settings, and what is ``given`` in their place."""
        chosen = options.overlaid(TokenOptions.of(given.get("options")))
        return cls(**settings | dict(given) | {"options": chosen})

    @abstractmethod
    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        """Exact counts for a span of ``tokens`` in a decoder of ``depth`` layers; raises ``BudgetError`` below the
        floor."""

    def known_options(self) -> tuple[str, ...]:
        """Names of the options that the method has, in the order of ``TokenOptions``."""
        return _known_options(type(self))

    def usual_options(self) -> TokenOptions:
        """The options of the method where nothing is given."""
        return _usual_options(type(self))

    def with_settings(self: Method, settings: Mapping[str, Any]) -> Method:
        """The method with these settings; those that are left out, and options that are left out, stay as they are.

        Raises
        ------
        ValueError
            An unknown setting; those that there are are listed.
        """
        check_names(self.name, settings, [field.name for field in fields(self)])
        options = self.options.overlaid(TokenOptions.of(settings.get("options")))
        return replace(self, **dict(settings) | {"options": options})

    def settings(self) -> dict[str, object]:
        """Every field with its value; ``options`` as a mapping of those that the method has."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "options"}
        return own | {"options": {name: getattr(self.options, name) for name in self.known_options()}}

    def file_settings(self) -> tuple[str, ...]:
        """Names of the settings that name files."""
        return tuple(field.name for field in fields(self) if field.metadata.get("file"))

    def usual_settings(self) -> dict[str, object]:
        """The settings of the method where nothing is given."""
        return type(self)().settings()

    @property
    def signal_layers(self) -> tuple[Layer, ...]:
        """The vision layers whose signals the method is given: numbers, shares of the tower's depth (0.25: the last
        layer of its first quarter), or None for the family's own."""
        return ()

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

    @property
    def reenters(self) -> bool:
        """True if tokens that a decoder layer leaves out may come back later."""
        return self.options.reentry != "none"

    def repeated_stages(self, depth: int, first: int) -> frozenset[int]:
        """With re-entry, layers behind ``first`` (the first that leaves tokens out) in front of which ``prune_tokens``
        chooses anew even where the number of tokens stays."""
        return frozenset()

    def extra_stages(self, depth: int) -> frozenset[int]:
        """Layers before which ``prune_tokens`` is called even where the plan drops nothing: to reorder, or to observe."""
        return frozenset()

    def uses_text_queries(self) -> bool:
        """True if text queries are made for the method."""
        return bool(self.requires & TEXT_QUERY_INPUTS)

    def uses_attention(self) -> bool:
        """True if queries or keys of a decoder layer are made for the method."""
        return bool(self.requires & ATTENTION_INPUTS)


@functools.cache
def _known_options(cls: type[Reducer]) -> tuple[str, ...]:
    known = frozenset[str]().union(*(vars(base).get("option_names", ()) for base in cls.__mro__))
    return tuple(name for name in NAMES if name in known)


@functools.cache
def _usual_options(cls: type[Reducer]) -> TokenOptions:
    declared: list[TokenOptions] = [vars(base).get("default_options", TokenOptions()) for base in reversed(cls.__mro__)]
    return functools.reduce(TokenOptions.overlaid, declared)


def check_picks(picks: int) -> None:
    if picks < 1:
        raise ValueError(f"picks={picks}: how many tokens a greedy step chooses, at least 1")
