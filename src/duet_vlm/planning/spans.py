"""Spans that consist of parts (crops of an image, frames of a clip) and structure rows (newlines): what the plan of a span becomes.

Exact integer arithmetic, as in ``budget``. A span is planned as a whole; with ``each`` every part then gets its share of the rows that
enter, so that V2V runs part by part under one budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from duet_vlm.planning.budget import Budget, BudgetError, SpanPlan


def plan_span(
    solve: Callable[..., SpanPlan],
    budget: Budget | None,
    sizes: Sequence[int],
    structure: int,
    each: bool,
    keep_structure: bool,
    left: Sequence[int] | None = None,
) -> SpanPlan:
    """The plan of a span with parts of ``sizes`` tokens and ``structure`` rows beside them.

    With a budget the span is solved as a whole, and kept structure rows are taken from the budget first. Settings of a method
    (``dominant=160``) count per part if ``each``, and kept structure rows come on top of them. ``left``: of each part, how many a threshold in
    the tower left; ``solve`` then takes that, too.

    Raises
    ------
    BudgetError
        If kept structure rows leave no row for the picture.
    """
    tokens = sum(sizes) + structure
    parts = list(zip(sizes, *(() if left is None else (left,)), strict=True))
    own = [solve(*part) for part in parts] if each and budget is None else None
    if own is None:
        plan = solve(tokens, *(() if left is None else (sum(left) + structure,)))
    elif any(plan.merges for plan in own):
        plan = _sum(own, tokens)
    else:
        plan = _more(_sum(own, tokens), structure)
    if not plan.merges:
        return plan
    if structure and keep_structure:
        plan = _with_structure(plan, structure, budget)
    plan = _of_content(plan, sum(sizes if left is None else left))
    if not each:
        return plan
    entry, contextual = plan.entry - plan.structure, plan.contextual
    if own is not None and entry == sum(p.entry for p in own):
        return replace(plan, parts=tuple((p.dominant, p.contextual) for p in own))
    rows = apportion(entry, sizes if left is None else left)
    merged = apportion(contextual, rows)
    return replace(plan, parts=tuple((n - k, k) for n, k in zip(rows, merged, strict=True)))


def apportion(total: int, sizes: Sequence[int]) -> list[int]:
    """``total`` <= sum(sizes) split in proportion to ``sizes``, none above its size: largest remainders first, ties to the earlier part."""
    whole = sum(sizes)
    if whole == 0:
        return [0] * len(sizes)
    shares = [total * size // whole for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % whole), i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


def shared_out(total: int, sizes: Sequence[int], least: Sequence[int]) -> list[int]:
    """``total`` as ``apportion`` splits it; where a part would get less than its ``least``, every part has that, and the rest is apportioned."""
    shares = apportion(total, sizes)
    if all(share >= few for share, few in zip(shares, least, strict=True)):
        return shares
    rest = apportion(max(0, total - sum(least)), [size - few for size, few in zip(sizes, least, strict=True)])
    return [few + more for few, more in zip(least, rest, strict=True)]


def tower_counts(plan: SpanPlan, sizes: Sequence[int], fed: int = 0, least: int = 1) -> Sequence[int]:
    """Of a span's parts of ``sizes`` tokens, how many of each go through the tower's blocks: no fewer than ``least``, or all there are, and one of a
    part without any. ``fed`` rows of each part that are no patches (CLS) are among the plan's tokens; they stay and are not counted."""
    if plan.tower is None:
        return sizes
    few = [min(size, least) for size in sizes]
    wanted = max(sum(few), plan.tower - fed * len(sizes))
    left = shared_out(min(sum(sizes), wanted), sizes, few)
    enter = [sum(part) - fed for part in plan.parts] or left
    if sum(enter) == wanted:  # all that is left enters
        left = enter
    return [max(1, *some) for some in zip(left, enter, strict=True)]  # shares of a smaller sum can be larger by one


def of_each_part(plan: SpanPlan, sizes: Sequence[int], least: Sequence[int]) -> SpanPlan:
    """The plan of a span of which all that a tower leaves enters, with no fewer rows of any part than its ``least``."""
    if plan.tower is None:
        return plan
    content = max(plan.entry - plan.structure, sum(least))
    parts, more = plan.parts, content + plan.structure - plan.entry
    if parts and any(sum(part) < few for part, few in zip(parts, least, strict=True)):
        parts = tuple((rows, 0) for rows in shared_out(content, sizes, least))
    counts = tuple(count + more for count in plan.counts)
    return replace(plan, dominant=plan.dominant + more, counts=counts, tower=content, parts=parts)


def _sum(plans: Sequence[SpanPlan], tokens: int) -> SpanPlan:
    counts = tuple(sum(layer) for layer in zip(*(plan.counts for plan in plans), strict=True))
    left = [plan.tokens if plan.tower is None else plan.tower for plan in plans]
    tower = None if all(plan.tower is None for plan in plans) else sum(left)
    return SpanPlan(tokens, sum(plan.dominant for plan in plans), sum(plan.contextual for plan in plans), counts, tower=tower)


def _more(plan: SpanPlan, rows: int) -> SpanPlan:
    return replace(plan, dominant=plan.dominant + rows, counts=tuple(count + rows for count in plan.counts))


def _with_structure(plan: SpanPlan, structure: int, budget: Budget | None) -> SpanPlan:
    if budget is None:
        return replace(_more(plan, structure), structure=structure)
    if plan.entry <= structure:
        raise BudgetError(
            f"newline_tokens='keep': the budget lets {plan.entry} of {plan.tokens} rows enter the decoder, but {structure} of them are newlines; "
            "raise the budget or use newline_tokens='drop'"
        )
    contextual = min(plan.contextual, plan.entry - structure - 1)
    return replace(plan, dominant=plan.entry - contextual, contextual=contextual, structure=structure)


def _of_content(plan: SpanPlan, content: int) -> SpanPlan:
    """A reduced span keeps no rows but ``content`` of the picture and the structure rows that are kept."""
    most = content + plan.structure
    if plan.entry <= most:
        return plan
    dominant = min(plan.dominant, most)
    return replace(
        plan, dominant=dominant, contextual=min(plan.contextual, most - dominant), counts=tuple(min(n, most) for n in plan.counts)
    )
