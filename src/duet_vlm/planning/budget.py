"""Budgets, schedules and plans: exact arithmetic on Python integers, no tensors.

A *budget* is the mean number of visual tokens of one span per decoder layer, counted at each layer's input (int), or
that mean as a fraction of the span's unreduced tokens (float in (0, 1]). A *plan* gives for one span how many tokens
enter the decoder and how many are at the input of each layer. Methods turn budgets into plans; this module holds the
terms and the arithmetic they share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from duet_vlm.utils.field_types import to_plain

EPSILON = 1e-9  # a keep of 0.3 of 10 tokens means 3, whatever the binary fraction says

Budget = int | float
Keep = int | float
# (blocks of a vision tower whose attention has run, units of a picture that are left), in order
TowerStages = tuple[tuple[int, int], ...]


class BudgetError(ValueError):
    """A budget that the method cannot meet. ``floor`` is the smallest mean token count that it can meet (None if
    unknown)."""

    def __init__(self, message: str, floor: float | None = None) -> None:
        super().__init__(message)
        self.floor = floor


class NoBudget(BudgetError):
    """Neither a budget nor what a method takes in place of one: ``instead`` are those settings."""

    def __init__(self, message: str, example: str = "") -> None:
        super().__init__(message)
        self.instead = tuple(re.findall(r"(\w+)=", example))


@dataclass(frozen=True)
class SpanPlan:
    """The plan of one span: its token counts at every stage.

    Attributes
    ----------
    tokens : int
        Visual tokens of the unreduced span.
    dominant, contextual : int
        Tokens that enter the decoder: kept ones, and merged ones.
    counts : tuple of int
        Tokens at the input of each decoder layer.
    structure : int
        Newlines among the dominant tokens, which are kept unchanged.
    parts : tuple of (int, int)
        (dominant, contextual) of every crop or frame, where each is reduced independently.
    floored : bool
        The span is too small for its fractional budget and got the method's floor instead (``plan_or_clamp``).
    tower : int or None
        Tokens that leave the vision tower, where a method reduces inside it; no more can enter the decoder.
    """

    tokens: int
    dominant: int
    contextual: int
    counts: tuple[int, ...]
    structure: int = 0
    parts: tuple[tuple[int, int], ...] = ()
    floored: bool = False
    tower: int | None = None

    @property
    def entry(self) -> int:
        """Tokens of the span that enter the decoder."""
        return self.dominant + self.contextual

    @property
    def mean(self) -> float:
        """Tokens of the span at the input of a decoder layer, mean over the layers."""
        return sum(self.counts) / len(self.counts)

    @property
    def reduces_entry(self) -> bool:
        """True if the encoder stage changes anything: the span is not simply kept whole."""
        return self.contextual > 0 or self.dominant < self.tokens


def check_budget(budget: Budget | None) -> None:
    """Refuse a budget that is neither a positive token count nor a fraction in (0, 1]."""
    if budget is None:
        return
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise TypeError(f"budget must be an int (mean visual tokens per layer) or a float in (0, 1], got {budget!r}")
    if isinstance(budget, Integral):
        if budget < 1:
            raise BudgetError(f"budget={budget} tokens: give at least 1, or a fraction in (0, 1]")
    elif not 0 < budget <= 1:
        raise BudgetError(
            f"budget={budget}: a float is a fraction in (0, 1] of the visual tokens; for a token count give an int"
        )


def read_budget(text: str, name: str = "budget") -> Budget:
    """A budget as people write it: ``64`` is a token count, ``0.22`` and ``22%`` are fractions; ``1`` is one token.

    Raises
    ------
    ValueError
        If the text is neither, or out of range: ``name`` and the text as it was written, and what to write instead.
    """
    cleaned = text.strip()
    try:
        if cleaned.endswith("%"):
            value: Budget = float(cleaned[:-1]) / 100
        else:
            value = int(cleaned) if cleaned.lstrip("+-").isdigit() else float(cleaned)
    except ValueError:
        raise ValueError(f"{name} {text}: give a token count (64), a fraction (0.22) or a percentage (22%)") from None
    if isinstance(value, int) and value < 1:
        raise BudgetError(f"{name} {text}: keep at least 1 token, or a share of them (0.22, 22%)")
    if isinstance(value, float) and not 0 < value <= 1:
        all_of_them = "above 0 % and up to 100 %" if cleaned.endswith("%") else "above 0 and up to 1.0"
        count = (
            f"; for a token count write a whole number ({value:.0f})"
            if value > 1 and math.isfinite(value) and cleaned[-1] != "%"
            else ""
        )
        raise BudgetError(
            f"{name} {text}: a fraction of the visual tokens is {all_of_them}, which is all of them{count}"
        )
    return value


def target_mean(budget: Budget, tokens: int) -> float:
    """The mean token count that ``budget`` allows a span of ``tokens`` (never more than the span has)."""
    check_budget(budget)
    target = float(budget) if isinstance(budget, Integral) else budget * tokens
    return min(target, float(tokens))


def check_keep(name: str, keep: Keep) -> None:
    """Refuse a keep that is neither a count nor a fraction in [0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise TypeError(f"{name} must be an int (tokens) or a float in [0, 1] (fraction), got {keep!r}")
    if isinstance(keep, Integral):
        if keep < 0:
            raise ValueError(f"{name}={keep}: a token count cannot be negative")
    elif not 0.0 <= keep <= 1.0:
        raise ValueError(f"{name}={keep}: a float is a fraction in [0, 1]; for a token count give an int")


def count_of(keep: Keep, tokens: int, rounding: str = "floor") -> int:
    """Number of tokens that ``keep`` means, at most ``tokens``.

    ``rounding`` of fractions: "floor" (of the exact product), "int" (truncated float product: 50 * 0.58 is 28, as
    released code of several methods has it) or "round".
    """
    if isinstance(keep, Integral):
        return min(int(keep), tokens)
    product = tokens * float(keep)
    if rounding == "floor":
        return min(math.floor(product + EPSILON), tokens)
    return min(int(product) if rounding == "int" else round(product), tokens)


Schedule = tuple[tuple[int, Keep], ...]


def check_schedule(schedule: Sequence[Sequence[Keep]], may_grow: bool = False) -> Schedule:
    """Return a schedule as sorted tuples ((layer, keep), ...); keeps are relative to decoder entry and may not grow
    with depth, unless ``may_grow`` (with re-entry)."""
    try:
        stages = tuple((to_plain(layer), to_plain(keep)) for layer, keep in schedule)
    except (TypeError, ValueError):
        raise TypeError(f"schedule must be a sequence of (layer, keep) pairs, got {schedule!r}") from None
    for layer, keep in stages:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ValueError(
                f"schedule={schedule!r}: layer {layer!r} must be an int >= 0 (drop before that decoder layer)"
            )
        check_keep("schedule keep", keep)
    layers = [layer for layer, _ in stages]
    if layers != sorted(set(layers)):
        raise ValueError(f"schedule={schedule!r}: layers must be strictly increasing")
    for (_, a), (_, b) in zip(stages, stages[1:], strict=False):
        if not may_grow and isinstance(a, Integral) == isinstance(b, Integral) and b > a:
            raise ValueError(
                f"schedule={schedule!r}: a later stage cannot keep more ({b}) than an earlier one ({a}); with "
                "options={'reentry': 'stage'} it can"
            )
    return stages


def layer_counts(
    entry: int, depth: int, schedule: Schedule, rounding: str = "floor", may_grow: bool = False
) -> tuple[int, ...]:
    """Visual tokens at the input of each of ``depth`` layers when ``entry`` tokens enter and ``schedule`` drops.

    ``may_grow``: a stage may keep more than the one before it (with re-entry).
    """
    counts = [entry] * depth
    for layer, keep in schedule:
        if layer >= depth:
            raise ValueError(f"schedule drops before layer {layer}, but this decoder has layers 0..{depth - 1}")
        kept = min(count_of(keep, entry, rounding), entry if may_grow else counts[layer])
        counts[layer:] = [kept] * (depth - layer)
    return tuple(counts)


def largest_int(high: int, fits: Callable[[int], bool]) -> int:
    """Largest x in 0..high with ``fits(x)``, which must be monotone (true, then false); -1 if even 0 does not fit."""
    low, top = -1, high
    while low < top:
        middle = (low + top + 1) // 2
        if fits(middle):
            low = middle
        else:
            top = middle - 1
    return low


def largest_fraction(fits: Callable[[float], bool]) -> float:
    """Largest fraction in [0, 1] with ``fits(share)`` (monotone), to double precision."""
    if fits(1.0):
        return 1.0
    low, top = 0.0, 1.0
    for _ in range(60):
        middle = (low + top) / 2
        low, top = (middle, top) if fits(middle) else (low, middle)
    return low


def mean_within(counts: Sequence[int], target: float) -> bool:
    """True if the mean of ``counts`` is at most ``target``."""
    return sum(counts) <= target * len(counts) + EPSILON


def infeasible_budget(method: str, target: float, floor: float, tokens: int, why: str) -> BudgetError:
    """The one error for a budget below a method's floor."""
    return BudgetError(
        f"{method} cannot reach {target:.4g} mean visual tokens per layer on a span of {tokens} tokens: {why}, so "
        "its floor is "
        f"{floor:.4g} tokens ({floor / tokens:.1%}). Raise the budget or take a method that reduces before the "
        "decoder (duet, visionzip).",
        floor,
    )
