"""Plans of spans that consist of parts (crops of an image, frames of a video) and separators (newlines).

Exact integer arithmetic, as in ``budget``. A span is planned as a whole; with ``each`` every part then gets its share
of the tokens that enter, so that the encoder stage runs part by part under one budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

from duet_vlm.planning.budget import Budget, BudgetError, SpanPlan, infeasible_budget, target_mean


@dataclass(frozen=True)
class TowerFloors:
    """Floors of a method that works in the vision tower alone.

    Attributes
    ----------
    method : str
        Its name.
    least : int
        Tokens of a part that are always kept, where it has so many.
    small : int
        Tokens of a part below which a fraction that cannot be met becomes the floor.
    kept_structure : int
        Separators of the span that are kept.
    depth : int
        Decoder layers.
    each : bool
        Parts are reduced one by one.
    """

    method: str
    least: int
    small: int
    kept_structure: int
    depth: int
    each: bool

    def structure_alone(self, tokens: int, parts: int) -> SpanPlan:
        """The plan of a span of ``tokens`` that keeps its separators and nothing else."""
        kept = self.kept_structure
        counts, none = (kept,) * self.depth, ((0, 0),) * (parts * self.each)
        return SpanPlan(tokens, kept, 0, counts, structure=kept, parts=none, tower=0)


def plan_parts(
    solve: Callable[..., SpanPlan],
    budget: Budget | None,
    sizes: Sequence[int],
    structure: int,
    each: bool,
    keep_structure: bool,
    left: Sequence[int] | None = None,
) -> SpanPlan:
    """The plan of a span with parts of ``sizes`` tokens and ``structure`` separators beside them.

    With a budget the span is solved as a whole, and kept separators are taken from the budget first. Settings of a
    method (``dominant=160``) count per part if ``each``, and kept separators come on top of them. ``left``: tokens of
    each part that a threshold in the tower kept; ``solve`` then takes them, too.

    Raises
    ------
    BudgetError
        If kept separators leave no token for the image.
    """
    tokens = sum(sizes) + structure
    parts = list(zip(sizes, *(() if left is None else (left,)), strict=True))
    part_plans = [solve(*part) for part in parts] if each and budget is None else None
    if part_plans is None:
        plan = solve(tokens, *(() if left is None else (sum(left) + structure,)))
    elif any(plan.reduces_entry for plan in part_plans):
        plan = _sum(part_plans, tokens)
    else:
        plan = _more(_sum(part_plans, tokens), structure)
    if not plan.reduces_entry:
        return plan
    if structure and keep_structure:
        plan = _with_structure(plan, structure, budget)
    plan = _of_content(plan, sum(sizes if left is None else left))
    if not each:
        return plan
    entry, contextual = plan.entry - plan.structure, plan.contextual
    if part_plans is not None and entry == sum(p.entry for p in part_plans):
        return replace(plan, parts=tuple((p.dominant, p.contextual) for p in part_plans))
    rows = apportion(entry, sizes if left is None else left)
    merged = apportion(contextual, rows)
    return replace(plan, parts=tuple((n - k, k) for n, k in zip(rows, merged, strict=True)))


def plan_parts_of_tower(
    solve: Callable[[], SpanPlan],
    budget: Budget | None,
    sizes: Sequence[int],
    structure: int,
    floors: TowerFloors,
) -> SpanPlan:
    """The plan of a span whose method works in the vision tower alone: every part keeps at least its floor.

    ``solve`` is ``plan_parts`` of the span.

    Raises
    ------
    BudgetError
        As ``solve``, and where a part has less than its floor. With a fraction, parts of fewer tokens than
        ``floors.small`` get the smallest possible count instead.
    """
    least = [min(size, floors.least) for size in sizes]
    floor, tokens = sum(least) + floors.kept_structure, sum(sizes) + structure
    try:
        plan = solve()
    except BudgetError as error:
        if error.floor is None or error.floor >= floor:
            raise
        plan = floors.structure_alone(tokens, len(sizes))
    if not plan.reduces_entry or plan.entry - plan.structure >= sum(least) or budget is None:
        return of_each_part(plan, sizes, least)
    if isinstance(budget, Integral) or max(sizes) >= floors.small:
        each_of = f"each of its {len(sizes)} crops or frames" if len(sizes) > 1 else "it"
        what = f"of {each_of} no fewer than {min(max(sizes), floors.least)} tokens enter the decoder"
        raise infeasible_budget(floors.method, target_mean(budget, tokens), floor, tokens, what)
    return replace(of_each_part(plan, sizes, least), floored=True)


def apportion(total: int, sizes: Sequence[int]) -> list[int]:
    """Split ``total`` <= sum(sizes) in proportion to ``sizes``, none above its size: largest remainders first, ties to
    the earlier part."""
    size_sum = sum(sizes)
    if size_sum == 0:
        return [0] * len(sizes)
    shares = [total * size // size_sum for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % size_sum), i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


def shared_out(total: int, sizes: Sequence[int], least: Sequence[int]) -> list[int]:
    """Split ``total`` as ``apportion``; if a part would get less than its ``least``, every part gets that, and the rest
    is apportioned."""
    shares = apportion(total, sizes)
    if all(share >= minimum for share, minimum in zip(shares, least, strict=True)):
        return shares
    rest = apportion(max(0, total - sum(least)), [size - minimum for size, minimum in zip(sizes, least, strict=True)])
    return [minimum + extra for minimum, extra in zip(least, rest, strict=True)]


def tower_counts(plan: SpanPlan, sizes: Sequence[int], fed: int = 0, least: int = 1) -> Sequence[int]:
    """Tokens of each part of a span that pass through the tower's blocks: at least ``least``, or all of a smaller part,
    and one of an empty part.

    ``fed`` tokens of each part that come from no patch (CLS) are among the plan's tokens; they are kept and not
    counted.
    """
    if plan.tower is None:
        return sizes
    minimum = [min(size, least) for size in sizes]
    target = max(sum(minimum), plan.tower - fed * len(sizes))
    kept = shared_out(min(sum(sizes), target), sizes, minimum)
    enter = [sum(part) - fed for part in plan.parts] or kept
    if sum(enter) == target:  # all kept tokens enter
        kept = enter
    return [max(1, *counts) for counts in zip(kept, enter, strict=True)]  # shares of a smaller sum can be larger by one


def of_each_part(plan: SpanPlan, sizes: Sequence[int], least: Sequence[int]) -> SpanPlan:
    """The plan of a span whose tokens from the tower all enter the decoder, with at least ``least`` tokens of each
    part."""
    if plan.tower is None:
        return plan
    content = max(plan.entry - plan.structure, sum(least))
    parts, added = plan.parts, content + plan.structure - plan.entry
    if parts and any(sum(part) < few for part, few in zip(parts, least, strict=True)):
        parts = tuple((rows, 0) for rows in shared_out(content, sizes, least))
    counts = tuple(count + added for count in plan.counts)
    return replace(plan, dominant=plan.dominant + added, counts=counts, tower=content, parts=parts)


def _sum(plans: Sequence[SpanPlan], tokens: int) -> SpanPlan:
    counts = tuple(sum(layer) for layer in zip(*(plan.counts for plan in plans), strict=True))
    tower_tokens = [plan.tokens if plan.tower is None else plan.tower for plan in plans]
    tower = None if all(plan.tower is None for plan in plans) else sum(tower_tokens)
    return SpanPlan(
        tokens, sum(plan.dominant for plan in plans), sum(plan.contextual for plan in plans), counts, tower=tower
    )


def _more(plan: SpanPlan, rows: int) -> SpanPlan:
    return replace(plan, dominant=plan.dominant + rows, counts=tuple(count + rows for count in plan.counts))


def _with_structure(plan: SpanPlan, structure: int, budget: Budget | None) -> SpanPlan:
    if budget is None:
        return replace(_more(plan, structure), structure=structure)
    if plan.entry <= structure:
        raise BudgetError(
            f"newline_tokens='keep': the budget lets {plan.entry} of {plan.tokens} rows enter the decoder, but "
            f"{structure} of them are newlines; "
            "raise the budget or use newline_tokens='drop'"
        )
    contextual = min(plan.contextual, plan.entry - structure - 1)
    return replace(plan, dominant=plan.entry - contextual, contextual=contextual, structure=structure)


def _of_content(plan: SpanPlan, content: int) -> SpanPlan:
    """Limit a reduced span to ``content`` tokens of the image plus the kept separators."""
    limit = content + plan.structure
    if plan.entry <= limit:
        return plan
    dominant = min(plan.dominant, limit)
    return replace(
        plan,
        dominant=dominant,
        contextual=min(plan.contextual, limit - dominant),
        counts=tuple(min(n, limit) for n in plan.counts),
    )
