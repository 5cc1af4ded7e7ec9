"""Compositions: methods inside the tower, before the decoder and inside it that run as one method under one budget."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from duet_vlm.methods.video.frames import Frames
from duet_vlm.ops.ragged import gather_rows, pack_right, upload
from duet_vlm.planning.budget import (
    EPSILON,
    Budget,
    NoBudget,
    SpanPlan,
    count_of,
    infeasible_budget,
    largest_int,
    mean_within,
    target_mean,
)
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.calibration import Calibration
from duet_vlm.reducers.compressor import Compressor, compressor_of
from duet_vlm.reducers.decoder import DecoderReducer, DecoderView
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.encoder_view import Layer
from duet_vlm.reducers.inputs import DECODER_INPUTS, ENCODER_INPUTS, FEATURE_INPUTS, Input
from duet_vlm.reducers.plans import plan_keep_all
from duet_vlm.reducers.scoring import ScoringRules
from duet_vlm.reducers.vision_tower import TowerReducer

ORDER = "at most one of each, in this order: a method in the tower, frames, a method that reduces before the decoder, a method that drops inside it"
LEFT, SPARE = 0.56, 1.5  # of a picture, and of what enters, that go through the tower where nobody says how many
FIRST_SETTINGS = {each.name for each in fields(EncoderReducer)}
SECOND_SETTINGS = {each.name for each in fields(DecoderReducer)}
DROPPING = ("score_layer_offset", "score_heads", "score_states", "merges")  # what a method inside the decoder declares
SHARED = FIRST_SETTINGS | SECOND_SETTINGS

Roles = tuple[TowerReducer | None, Frames | None, EncoderReducer | None, DecoderReducer | None]
Classes = tuple[
    type[TowerReducer] | None, type[Frames] | None, type[EncoderReducer] | None, type[DecoderReducer] | None
]


def compose(*stages: Reducer) -> Composition:
    """Make one method of two to four: ``compose(Frames(), Duet())``, ``compose(Contrast(), VisionZip(),
    PyramidDrop())``.

    A method that reduces both before and inside the decoder (``Duet``) does both, unless a method that drops inside the
    decoder follows it. See ``Composition``.

    Parameters
    ----------
    *stages : Reducer
        Instances, in the order in which they run.

    Raises
    ------
    ValueError
        If the stages are in the wrong order, or differ in a shared setting.
    TypeError
        If a stage is not a method.
    """
    for stage in stages:
        if not isinstance(stage, Reducer):
            raise TypeError(f"compose: {stage!r} is no method; give instances, e.g. compose(Frames(), Duet())")
    cls = composition_class(tuple(type(stage) for stage in stages))
    settings: dict[str, Any] = {}
    for stage in stages:
        for each in fields(stage):
            if cls.owners.get(each.name) in (None, type(stage)):
                settings[each.name if each.name in SHARED else f"{stage.name}_{each.name}"] = getattr(stage, each.name)
    for stage in stages:
        for each in fields(stage):
            value = getattr(stage, each.name)
            matters = each.name == "positions" or (each.name in SHARED and value != each.default)
            if matters and value != settings[each.name]:
                raise ValueError(
                    f"{cls.name}: {stage.name} wants {each.name}={value!r}, {cls.owners[each.name].name} {settings[each.name]!r}; "
                    "a composition has one, give both the same"
                )
    return cls(**settings)


@cache
def composition_class(stages: tuple[type[Reducer], ...]) -> type[Composition]:
    """Make the class of a composition, as ``attach(model, "frames+duet")`` finds it."""
    tower, frames, first, second = roles = _roles(stages)
    sees = first or frames or tower
    assert sees is not None  # checked by _roles
    facts: dict[str, Any] = {
        "name": "+".join(stage.name for stage in stages),
        "paper": " + ".join(stage.paper for stage in stages),
        "summary": ", then ".join(stage.name for stage in stages) + ", under one budget",
        "stages": stages,
        "roles": roles,
        "owners": dict.fromkeys(SECOND_SETTINGS, second) | dict.fromkeys(FIRST_SETTINGS, sees),
        "reduces_in_tower": tower is not None,
        "compares_frames": frames is not None or sees.compares_frames,
    }
    if second is not None:
        facts |= {name: getattr(second, name) for name in DROPPING}
    settings = [
        (
            each.name if each.name in SHARED else f"{stage.name}_{each.name}",
            each.type,
            field(default=each.default, metadata=each.metadata),
        )
        for stage in stages
        for each in fields(stage)
        if facts["owners"].get(each.name) in (None, stage)
    ]
    base = Composition if second is None else DecoderComposition
    return dataclasses.make_dataclass(
        "".join(stage.__name__ for stage in stages), settings, bases=(base,), namespace=facts, frozen=True
    )


def _roles(stages: tuple[type[Reducer], ...]) -> Classes:
    """Assign the stages to their roles: inside the tower, frame selection, before the decoder, inside the decoder.

    Raises
    ------
    ValueError
        If the stages are in the wrong order.
    """
    for stage in stages:
        if not hasattr(stage, "name"):
            raise ValueError(f"compose: {stage.__name__} has no name; register it first (duet_vlm.register)")
    tower = stages[0] if stages and issubclass(stages[0], TowerReducer) else None
    behind = stages if tower is None else stages[1:]
    frames = behind[0] if behind and issubclass(behind[0], Frames) else None
    rest = behind if frames is None else behind[1:]
    second = rest[-1] if rest and issubclass(rest[-1], DecoderReducer) else None
    before = rest if second is None else rest[:-1]
    first = before[0] if before else second if second is not None and issubclass(second, EncoderReducer) else None
    wrong = any(not issubclass(stage, EncoderReducer) for stage in before)
    wrong |= any(issubclass(stage, TowerReducer | Frames | Composition) for stage in rest)
    if frames is not None and first is not None and issubclass(first, EncoderReducer) and first.compares_positions:
        raise ValueError(
            f"compose({frames.name}, {first.name}): {first.name} compares the same places of frames, which are not known of the tokens that "
            f"{frames.name} leaves; leave {frames.name} out"
        )
    if not 2 <= len(stages) <= 4 or len(set(stages)) < len(stages) or len(before) > 1 or wrong:
        names = ", ".join(stage.name for stage in stages)
        raise ValueError(f"compose({names}): give two to four different methods, {ORDER}")
    return tower, frames, first, second  # type: ignore[return-value]


@dataclass(frozen=True)
class Composition(EncoderReducer):
    """Several methods as one: stages under one budget.

    A method in the tower drops some tokens of each image, ``frames`` narrows a video to a pool of candidates, the
    method before the decoder chooses and merges within the pool, and the method inside the decoder drops some of the
    entering tokens.

    Settings are those of the stages, prefixed by the stage's name (``frames_keep``, ``duet_dominant``); shared ones
    (``positions``, ``text_query``) are set once. Fractions of entering tokens are fractions of the whole span, not of
    the pool.

    A budget holds over the whole composition. If one method reduces both before and inside the decoder, or none reduces
    inside it, that method solves the budget as it does alone. Otherwise the drops follow their own schedule, or their
    paper's, and the largest entry that the budget allows is taken; the method before the decoder divides it into
    dominant and contextual tokens as it does alone. ``frames_keep`` is the size of the pool and never less than the
    entry; left out, the two stages narrow by the same factor (the geometric mean of all tokens and the entry). Without
    a method before the decoder the pool itself enters.

    The entry is at most the number of tokens that survive the tower. Where the budget allows more, all survivors enter
    and the drops keep more, with a warning. Left out, the tower's own ``keep`` (``contrast_keep``) is 56 % of an image,
    and never less than 1.5 times the entry.

    Images have no frames: there the pool is the whole image (without a method before the decoder images are thinned
    evenly, see ``Frames``).

    Attributes
    ----------
    stages : tuple of type
        Classes of the stages, in order.
    roles : tuple
        The class inside the tower, the frame selection, the class before the decoder and the class inside it; None for
        an empty role.
    owners : dict of str to type
        For each shared setting, the stage that defines its default.
    """

    stages: ClassVar[tuple[type[Reducer], ...]]
    roles: ClassVar[Classes]
    owners: ClassVar[dict[str, type[Reducer]]]  # whose each shared setting is

    def __post_init__(self) -> None:
        super().__post_init__()
        *_, first, second = self._stages
        if second is None or second is first:
            return
        if getattr(first, "schedule", None):
            raise ValueError(
                f"{self.name}: {second.name} drops inside the decoder, so leave {self.stages[-2].name}_schedule out"
            )
        if isinstance(second, EncoderReducer) and second.with_paper_schedule(1000).plan(4096, 1000, None).merges:
            raise ValueError(
                f"{self.name}: {self.stages[-2].name} reduces before the decoder; of {second.name} set the drops only"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (self.stages, self.settings())

    @cached_property
    def _stages(self) -> Roles:
        """Stages with their settings, by role; a method that reduces before and inside the decoder occurs twice."""
        made = {cls: cls(**self._settings_of(cls)) for cls in self.stages}
        return tuple(None if cls is None else made[cls] for cls in self.roles)  # type: ignore[return-value]

    def _settings_of(self, cls: type[Reducer]) -> dict[str, Any]:
        own = {each.name: getattr(self, f"{cls.name}_{each.name}") for each in fields(cls) if each.name not in SHARED}
        return own | {
            each.name: getattr(self, each.name)
            for each in fields(cls)
            if each.name in SHARED and hasattr(self, each.name)
        }

    @property
    def tower_reducer(self) -> TowerReducer | None:
        return self._stages[0]

    @property
    def _sees(self) -> EncoderReducer:
        """Stage that gets the outputs of the vision tower."""
        tower, frames, first, _ = self._stages
        sees = first or frames or tower
        assert sees is not None  # checked by _roles
        return sees

    @property
    def requires(self) -> frozenset[Input]:  # type: ignore[override]
        _, frames, _, second = self._stages
        before = self._sees.requires & ENCODER_INPUTS
        if frames is not None and not before & FEATURE_INPUTS:
            before |= {Input.FEATURES}
        return before if second is None else before | second.requires & DECODER_INPUTS

    def scoring_rules(self) -> ScoringRules:
        return self._sees.scoring_rules()

    @property
    def trained_reducer(self) -> Compressor | None:
        return compressor_of(self._sees)

    @property
    def signal_layers(self) -> tuple[Layer, ...]:
        return self._sees.signal_layers

    # ---- how many

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        tower, _, first, _ = self._stages
        if tower is None:
            return self._behind(tokens, depth, budget)
        if tower.keep is None and budget is not None and target_mean(budget, tokens) >= tokens:
            return plan_keep_all(tokens, depth)
        wanted = self._wanted(tokens, depth, budget)
        left = self._left(tower, tokens, wanted)
        if first is not None and wanted.merges and wanted.entry > left:
            warnings.warn(
                f"{self.name}: {wanted.entry} of {tokens} tokens would enter the decoder, but the tower leaves {left}: all of those enter, and "
                f"later layers keep more. Raise {tower.name}_keep, or lower the budget",
                stacklevel=2,
            )
        return self.plan_after_tower(tokens, depth, budget, left)

    def plan_after_tower(self, tokens: int, depth: int, budget: Budget | None, left: int) -> SpanPlan:
        wanted, some = self._wanted(tokens, depth, budget), left if left < tokens else None
        if self._reduces_behind and wanted.entry <= left:
            return dataclasses.replace(wanted, tower=some)
        share = None if budget is None else min(1.0, target_mean(budget, tokens) / left)
        return dataclasses.replace(self._behind(left, depth, share), tokens=tokens, tower=some)

    def _wanted(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        """Plan of the stages after the tower, as if the tower dropped nothing."""
        return self._behind(tokens, depth, budget) if self._reduces_behind else plan_keep_all(tokens, depth)

    @property
    def _reduces_behind(self) -> bool:
        """True if a stage reduces between the tower and the decoder."""
        return any(stage is not None for stage in self._stages[1:3])

    def _left(self, tower: TowerReducer, tokens: int, wanted: SpanPlan) -> int:
        """Number of tokens of a span that survive the tower."""
        if tower.keep is not None:
            return max(1, count_of(tower.keep, tokens))
        if tower.by_threshold:
            return tokens
        entering = wanted.entry if wanted.merges else 0
        return min(tokens, max(1, math.ceil(LEFT * tokens), math.ceil(SPARE * entering)))

    def _behind(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        """Plan of the stages after the tower for a span of ``tokens``."""
        _, frames, first, second = self._stages
        alone = second if first is None and frames is None else frames if first is None and second is None else None
        if alone is not None:
            return alone.plan(tokens, depth, budget)
        if budget is None:
            return self._planned(tokens, depth)
        target = target_mean(budget, tokens)
        if target >= tokens:
            return plan_keep_all(tokens, depth)
        if first is not None and (second is None or second is first):
            return first.plan(tokens, depth, budget)
        assert second is not None
        if first is None and frames is not None and frames.keep is not None:
            entry = max(1, count_of(frames.keep, tokens), math.floor(target + EPSILON))
            return SpanPlan(tokens, entry, 0, second.plan(entry, depth, min(1.0, target / entry)).counts)
        return self._solved(second, tokens, depth, target)

    def _planned(self, tokens: int, depth: int) -> SpanPlan:
        """Plan by the stages' own settings, without a budget."""
        _, frames, first, second = self._stages
        pool = None if frames is None or frames.keep is None else frames.plan(tokens, depth, None)
        entering = pool if first is None else first.plan(tokens, depth, None)
        if entering is None:
            raise NoBudget(f"{self.name} needs a budget or frames_keep=", "frames_keep=")
        if pool is not None and not entering.merges:  # nobody else reduces before the decoder: the pool enters
            entering = pool
        elif second is first:
            return entering
        if second is None:
            return entering
        return dataclasses.replace(
            entering, counts=second.with_paper_schedule(depth).plan(entering.entry, depth, None).counts
        )

    def _solved(self, second: DecoderReducer, tokens: int, depth: int, target: float) -> SpanPlan:
        """Plan the largest entry whose mean under the drops is within ``target``.

        If all tokens enter and the budget is not used up, the drops keep more: first as if more tokens entered, then
        also at the stages that drop everything.
        """
        drops = second.with_paper_schedule(depth, target / tokens)

        def counts(entry: int, end: int) -> tuple[int, ...]:
            return tuple(accumulate((min(kept, tokens) or end for kept in drops.plan(entry, depth, None).counts), min))

        if not mean_within(counts(1, 0), target):
            # the earliest drops: at a small budget one token may still enter
            drops = second.with_paper_schedule(depth, 0.0)
        entry = largest_int(tokens << 30, lambda n: mean_within(counts(n, 0), target))
        if entry < 1:
            raise infeasible_budget(
                self.name, target, sum(counts(1, 0)) / depth, tokens, "at least one token enters the decoder"
            )
        end = largest_int(tokens, lambda n: mean_within(counts(entry, n), target)) if entry >= tokens else 0
        split = _split(self._stages[2], tokens, depth, min(entry, tokens))
        return dataclasses.replace(split, counts=counts(entry, end))

    def pool(self, plan: SpanPlan) -> int:
        """Number of candidates of a video that the frame selection passes to the next stage."""
        _, frames, first, _ = self._stages
        if frames is None or first is None:
            return plan.tokens if frames is None else plan.entry
        wanted = (
            math.ceil(math.sqrt(plan.entry * plan.tokens))
            if frames.keep is None
            else count_of(frames.keep, plan.tokens)
        )
        return max(plan.entry, wanted if plan.tower is None else min(wanted, plan.tower))

    # ---- which

    def select_tokens(self, view: EncoderView) -> Selection:
        tower, frames, first, _ = self._stages
        if first is None:
            alone = frames or tower
            assert alone is not None
            return alone.select_tokens(view)
        if frames is None or view.modality != "video":
            return first.select_tokens(view)
        sizes = [self.pool(plan) for plan in view.plans]
        pool = frames.changed(view, upload(sizes, view.valid.device))
        rows, valid = pack_right(pool, max(sizes))

        selection = first.select_tokens(
            dataclasses.replace(view.select_rows(lambda x: gather_rows(x, rows)), valid=valid)
        )

        def of_span(number: Tensor) -> Tensor:
            """Translate candidate numbers to token numbers; a number out of range becomes -1, which the runtime
            refuses.
            """
            inside = number.clamp(0, rows.shape[1] - 1)
            return torch.where(valid.gather(1, inside) & (inside == number), rows.gather(1, inside), -1)

        return dataclasses.replace(
            selection, index=of_span(selection.index), source_tokens=of_span(selection.source_tokens)
        )


@dataclass(frozen=True)
class DecoderComposition(Composition, DecoderReducer):
    """Composition whose last stage drops inside the decoder."""

    @property
    def _drops(self) -> DecoderReducer:
        drops = self._stages[3]
        assert drops is not None  # says _roles
        return drops

    def scoring_rules(self) -> ScoringRules:
        seen = self._sees.scoring_rules()
        return dataclasses.replace(
            self._drops.scoring_rules(), signal_segments=seen.signal_segments, signal_heads=seen.signal_heads
        )

    def extra_stages(self, depth: int) -> frozenset[int]:
        second = self._stages[3]
        return frozenset() if second is None else second.with_paper_schedule(depth).extra_stages(depth)

    def calibration(self) -> Calibration | None:
        second = self._stages[3]
        return None if second is None else second.calibration()

    def prune_tokens(self, view: DecoderView) -> Tensor:
        second = self._stages[3]
        assert second is not None
        return second.prune_tokens(view)


def _split(method: EncoderReducer | None, tokens: int, depth: int, entry: int) -> SpanPlan:
    """Split ``entry`` tokens into dominant and contextual ones, as ``method`` does under the budget at which that many
    enter.
    """
    if method is None:
        return SpanPlan(tokens, entry, 0, ())
    contextual = min(method.plan_entry(tokens, entry, depth).contextual, entry - 1)
    return SpanPlan(tokens, entry - contextual, contextual, ())


def _made_again(stages: tuple[type[Reducer], ...], settings: dict[str, Any]) -> Composition:
    """Rebuild a composition for pickle, which cannot find a class made at run time."""
    return composition_class(stages)(**settings)
