"""Compositions: methods inside the tower, before the decoder and inside it that run as one method under one budget."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

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
from duet_vlm.planning.solve import plan_keep_all
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.calibration import Calibration
from duet_vlm.reducers.compressor import Compressor, compressor_of
from duet_vlm.reducers.decoder import DecoderReducer, DecoderView
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.encoder_view import Layer
from duet_vlm.reducers.inputs import DECODER_INPUTS, ENCODER_INPUTS, FEATURE_INPUTS, Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.scoring import ScoringRules
from duet_vlm.reducers.vision_tower import TowerReducer
from duet_vlm.utils.field_types import check_names

ORDER = "at most one of each, in this order: a method in the tower, frames, a method that reduces before the decoder, a method that drops inside it"
LEFT, SPARE = 0.56, 1.5  # of a picture, and of what enters, that go through the tower where nobody says how many
DROPPING = ("score_layer_offset", "score_states", "merges")  # what a method inside the decoder declares


def compose(*stages: Reducer) -> Pipeline:
    """Make one method of two to four: ``compose(Frames(), Duet())``, ``compose(Contrast(), VisionZip(),
    PyramidDrop())``.

    A method that reduces both before and inside the decoder (``Duet``) does both, unless a method that drops inside the
    decoder follows it. See ``Pipeline``.

    Parameters
    ----------
    *stages : Reducer
        Instances, in the order in which they run.

    Raises
    ------
    ValueError
        If the stages are in the wrong order, or differ in an option.
    TypeError
        If a stage is not a method.
    """
    for stage in stages:
        if not isinstance(stage, Reducer):
            raise TypeError(f"compose: {stage!r} is no method; give instances, e.g. compose(Frames(), Duet())")
        if not hasattr(stage, "name"):
            raise ValueError(f"compose: {type(stage).__name__} has no name; register it first (duet_vlm.register)")
    rest = list(stages)
    tower = rest.pop(0) if rest and isinstance(rest[0], TowerReducer) else None
    frames = rest.pop(0) if rest and isinstance(rest[0], Frames) else None
    decoder = rest[-1] if rest and isinstance(rest[-1], DecoderReducer) else None
    before = rest if decoder is None else rest[:-1]
    encoder = before[0] if before else decoder if isinstance(decoder, EncoderReducer) else None
    wrong = any(isinstance(stage, TowerReducer | Frames | Pipeline) for stage in rest)
    wrong |= any(not isinstance(stage, EncoderReducer) for stage in before)
    names = ", ".join(stage.name for stage in stages)
    if frames is not None and isinstance(encoder, EncoderReducer) and encoder.compares_positions:
        raise ValueError(
            f"compose({frames.name}, {encoder.name}): {encoder.name} compares the same places of frames, which are not known of the tokens that "
            f"{frames.name} leaves; leave {frames.name} out"
        )
    if not 2 <= len(stages) <= 4 or len({*map(type, stages)}) < len(stages) or len(before) > 1 or wrong:
        raise ValueError(f"compose({names}): give two to four different methods, {ORDER}")
    kind = Pipeline if decoder is None else DecoderPipeline
    return kind(tower=tower, frames=frames, encoder=encoder, decoder=decoder)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Pipeline(EncoderReducer):
    """Several methods as one: stages under one budget. Made by ``compose``.

    A method in the tower drops some tokens of each image, ``frames`` narrows a video to a pool of candidates, the
    method before the decoder chooses and merges within the pool, and the method inside the decoder drops some of the
    entering tokens.

    Settings are those of the stages, prefixed by the stage's name (``frames_keep``, ``duet_dominant``); ``options``
    holds for all of them. Fractions of entering tokens are fractions of the whole span, not of the pool.

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
    tower : TowerReducer or None
        The method inside the vision tower.
    frames : Frames or None
        The choice among the tokens of a clip.
    encoder : EncoderReducer or None
        The method before the decoder.
    decoder : DecoderReducer or None
        The method inside the decoder; the same as ``encoder`` where one method does both.
    """

    tower: TowerReducer | None = None
    frames: Frames | None = None
    encoder: EncoderReducer | None = None
    decoder: DecoderReducer | None = None

    def __post_init__(self) -> None:
        for name, value in self._facts().items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "options", self._shared_options().overlaid(TokenOptions.of(self.options)))
        super().__post_init__()
        for role, stage in self._roles().items():
            if stage is not None:
                own = {name: getattr(self.options, name) for name in stage.known_options()}
                object.__setattr__(self, role, dataclasses.replace(stage, options=TokenOptions(**own)))
        if self.decoder is None or self._one_method:
            return
        if getattr(self.encoder, "schedule", None):
            assert self.encoder is not None  # has a schedule
            raise ValueError(
                f"{self.name}: {self.decoder.name} drops inside the decoder, so leave {self.encoder.name}_schedule out"
            )
        if (
            isinstance(self.decoder, EncoderReducer)
            and self.decoder.with_paper_schedule(1000).plan(4096, 1000, None).reduces_entry
        ):
            before = self.encoder or self.frames or self.tower
            assert before is not None  # two methods at least
            raise ValueError(
                f"{self.name}: {before.name} reduces before the decoder; of {self.decoder.name} set the drops only"
            )

    # ---- what it is made of

    def _roles(self) -> dict[str, Reducer | None]:
        return {"tower": self.tower, "frames": self.frames, "encoder": self.encoder, "decoder": self.decoder}

    @property
    def stages(self) -> tuple[Reducer, ...]:
        """The methods in the order in which they run; one that reduces before and inside the decoder once."""
        roles = [self.tower, self.frames, None if self._one_method else self.encoder, self.decoder]
        return tuple(stage for stage in roles if stage is not None)

    @property
    def _one_method(self) -> bool:
        """True if one method reduces before and inside the decoder."""
        return self.decoder is not None and self.encoder == self.decoder

    @property
    def _sees(self) -> EncoderReducer:
        """Stage that gets the outputs of the vision tower."""
        sees = self.encoder or self.frames or self.tower
        assert sees is not None  # checked by compose
        return sees

    def _facts(self) -> dict[str, Any]:
        """The facts that a single method declares in its class."""
        facts: dict[str, Any] = {
            "name": "+".join(stage.name for stage in self.stages),
            "paper": " + ".join(stage.paper for stage in self.stages),
            "summary": ", then ".join(stage.name for stage in self.stages) + ", under one budget",
            "reduces_in_tower": self.tower is not None,
            "compares_frames": self.frames is not None or self._sees.compares_frames,
        }
        if self.decoder is not None:
            facts |= {name: getattr(self.decoder, name) for name in DROPPING}
        return facts

    @property
    def requires(self) -> frozenset[Input]:  # type: ignore[override]
        required = self._sees.requires & ENCODER_INPUTS
        if self.frames is not None and not required & FEATURE_INPUTS:
            required |= {Input.FEATURES}
        return required if self.decoder is None else required | self.decoder.requires & DECODER_INPUTS

    def _owners(self) -> dict[str, Reducer]:
        """The stage whose default each option has."""
        owners: dict[str, Reducer] = dict.fromkeys(self._sees.known_options(), self._sees)
        if self.tower is not None:
            owners |= dict.fromkeys(TowerReducer.option_names, self.tower)
        if self.decoder is not None:
            owners |= dict.fromkeys(DecoderReducer.option_names, self.decoder)
        return owners

    def known_options(self) -> tuple[str, ...]:
        owners = self._owners()
        return tuple(each.name for each in fields(TokenOptions) if each.name in owners)

    def usual_options(self) -> TokenOptions:
        usual = {name: getattr(stage.usual_options(), name) for name, stage in self._owners().items()}
        return super().usual_options().overlaid(TokenOptions(**usual))

    def _shared_options(self) -> TokenOptions:
        """The options on which the stages agree: one that a stage changes must be the same for all."""
        owners = self._owners()
        shared = {name: getattr(stage.options, name) for name, stage in owners.items()}
        for stage in self.stages:
            for name in stage.known_options():
                value = getattr(stage.options, name)
                changed = name == "positions" or value != getattr(stage.usual_options(), name)
                if changed and value != shared[name]:
                    raise ValueError(
                        f"{self.name}: {stage.name} wants {name}={value!r}, {owners[name].name} {shared[name]!r}; "
                        "a composition has one, give both the same"
                    )
        return TokenOptions(**shared)

    def settings(self) -> dict[str, object]:
        own = {
            f"{stage.name}_{name}": value
            for stage in self.stages
            for name, value in stage.settings().items()
            if name != "options"
        }
        return own | {"options": {name: getattr(self.options, name) for name in self.known_options()}}

    def file_settings(self) -> tuple[str, ...]:
        return tuple(f"{stage.name}_{name}" for stage in self.stages for name in stage.file_settings())

    def usual_settings(self) -> dict[str, object]:
        return compose(*(type(stage)() for stage in self.stages)).settings()

    def with_settings(self, settings: Mapping[str, Any]) -> Pipeline:
        names = {f"{stage.name}_{each.name}": stage.name for stage in self.stages for each in fields(stage)}
        known = [name for name in names if not name.endswith("_options")]
        check_names(self.name, settings, [*known, "options"])
        options = self.options.overlaid(TokenOptions.of(settings.get("options")))
        changed: dict[str, Any] = {"options": options}
        for role, stage in self._roles().items():
            if stage is not None:
                own = {
                    name.removeprefix(f"{stage.name}_"): settings[name]
                    for name in settings
                    if names.get(name) == stage.name
                }
                changed[role] = stage.with_settings(own)
        return dataclasses.replace(self, **changed)

    @property
    def tower_reducer(self) -> TowerReducer | None:
        return self.tower

    def scoring_rules(self) -> ScoringRules:
        return self._sees.scoring_rules()

    @property
    def trained_reducer(self) -> Compressor | None:
        return compressor_of(self._sees)

    @property
    def signal_layers(self) -> tuple[Layer, ...]:
        return self._sees.signal_layers

    @property
    def clip_model(self) -> str | None:
        return self._sees.clip_model

    # ---- how many

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        tower = self.tower
        if tower is None:
            return self._behind(tokens, depth, budget)
        if tower.keep is None and budget is not None and target_mean(budget, tokens) >= tokens:
            return plan_keep_all(tokens, depth)
        wanted = self._wanted(tokens, depth, budget)
        left = self._left(tower, tokens, wanted)
        if self.encoder is not None and wanted.reduces_entry and wanted.entry > left:
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
        return self.frames is not None or self.encoder is not None

    def _left(self, tower: TowerReducer, tokens: int, wanted: SpanPlan) -> int:
        """Number of tokens of a span that survive the tower."""
        if tower.keep is not None:
            return max(1, count_of(tower.keep, tokens))
        if tower.by_threshold:
            return tokens
        entering = wanted.entry if wanted.reduces_entry else 0
        return min(tokens, max(1, math.ceil(LEFT * tokens), math.ceil(SPARE * entering)))

    def _behind(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        """Plan of the stages after the tower for a span of ``tokens``."""
        frames, first, second = self.frames, self.encoder, self.decoder
        alone = second if first is None and frames is None else frames if first is None and second is None else None
        if alone is not None:
            return alone.plan(tokens, depth, budget)
        if budget is None:
            return self._planned(tokens, depth)
        target = target_mean(budget, tokens)
        if target >= tokens:
            return plan_keep_all(tokens, depth)
        if first is not None and (second is None or self._one_method):
            return first.plan(tokens, depth, budget)
        assert second is not None
        if first is None and frames is not None and frames.keep is not None:
            entry = max(1, count_of(frames.keep, tokens), math.floor(target + EPSILON))
            return SpanPlan(tokens, entry, 0, second.plan(entry, depth, min(1.0, target / entry)).counts)
        return self._solved(second, tokens, depth, target)

    def _planned(self, tokens: int, depth: int) -> SpanPlan:
        """Plan by the stages' own settings, without a budget."""
        frames, first, second = self.frames, self.encoder, self.decoder
        pool = None if frames is None or frames.keep is None else frames.plan(tokens, depth, None)
        entering = pool if first is None else first.plan(tokens, depth, None)
        if entering is None:
            raise NoBudget(f"{self.name} needs a budget or frames_keep=", "frames_keep=")
        if pool is not None and not entering.reduces_entry:  # nobody else reduces before the decoder: the pool enters
            entering = pool
        elif self._one_method:
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
            kept = (min(kept, tokens) or end for kept in drops.plan(entry, depth, None).counts)
            return tuple(kept if self.reenters else accumulate(kept, min))

        if not mean_within(counts(1, 0), target):
            # the earliest drops: at a small budget one token may still enter
            drops = second.with_paper_schedule(depth, 0.0)
        entry = largest_int(tokens << 30, lambda n: mean_within(counts(n, 0), target))
        if entry < 1:
            raise infeasible_budget(
                self.name, target, sum(counts(1, 0)) / depth, tokens, "at least one token enters the decoder"
            )
        end = largest_int(tokens, lambda n: mean_within(counts(entry, n), target)) if entry >= tokens else 0
        split = _split(self.encoder, tokens, depth, min(entry, tokens))
        return dataclasses.replace(split, counts=counts(entry, end))

    def pool(self, plan: SpanPlan) -> int:
        """Number of candidates of a video that the frame selection passes to the next stage."""
        frames, first = self.frames, self.encoder
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
        frames, first = self.frames, self.encoder
        if first is None:
            return self._sees.select_tokens(view)
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
class DecoderPipeline(Pipeline, DecoderReducer):
    """A pipeline whose last stage drops inside the decoder."""

    @property
    def _drops(self) -> DecoderReducer:
        assert self.decoder is not None  # says compose
        return self.decoder

    def scoring_rules(self) -> ScoringRules:
        seen = self._sees.scoring_rules()
        return dataclasses.replace(
            self._drops.scoring_rules(), signal_segments=seen.signal_segments, signal_heads=seen.signal_heads
        )

    def extra_stages(self, depth: int) -> frozenset[int]:
        return self._drops.with_paper_schedule(depth).extra_stages(depth)

    def repeated_stages(self, depth: int, first: int) -> frozenset[int]:
        return self._drops.with_paper_schedule(depth).repeated_stages(depth, first)

    def calibration(self) -> Calibration | None:
        return self._drops.calibration()

    def prune_tokens(self, view: DecoderView) -> Tensor:
        return self._drops.prune_tokens(view)


def _split(method: EncoderReducer | None, tokens: int, depth: int, entry: int) -> SpanPlan:
    """Split ``entry`` tokens into dominant and contextual ones, as ``method`` does under the budget at which that many
    enter.
    """
    if method is None:
        return SpanPlan(tokens, entry, 0, ())
    contextual = min(method.plan_entry(tokens, entry, depth).contextual, entry - 1)
    return SpanPlan(tokens, entry - contextual, contextual, ())
