"""The race: candidates answer ever more questions, those that cannot win leave with a reason, and a ladder of the rest is tested.

Choosing and testing never share a question. The ladder is tested from its safest rung to its cheapest, each at the full level, and ends at the
first that fails (a fixed sequence of hypotheses, so the chance of a wrong rung at the end is at most the level, however many there are).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from duet_vlm.evaluate.experiment import Run
from duet_vlm.tune.bounds import LEVEL, chance, lower_bound

RUNGS = 6  # of the ladder, at most


@dataclass(frozen=True)
class Reply:
    """To one question: whether the full model's right answer was lost, and how far the first answer token's distribution moved (KL divergence,
    nats)."""

    lost: bool
    divergence: float


@dataclass
class Candidate:
    """A setting and what is known of it. ``ms``: measured time to the first token; ``reason``: why it left, empty while it has not."""

    run: Run
    ms: float = 0.0
    asked: int = 0
    lost: int = 0
    moved: float = 0.0
    tested: int = 0
    tested_lost: int = 0
    reason: str = ""
    losses: list[int] = field(default_factory=list)  # numbers of the questions

    @property
    def name(self) -> str:
        return self.run.id

    @property
    def divergence(self) -> float:
        """Mean over all questions so far."""
        return self.moved / max(1, self.asked + self.tested)

    @property
    def kept(self) -> float | None:
        """Share of answers kept, of all questions so far."""
        asked = self.asked + self.tested
        return 1 - (self.lost + self.tested_lost) / asked if asked else None

    @property
    def bound(self) -> float | None:
        """Of the test alone: nothing that chose it counts."""
        return lower_bound(self.tested - self.tested_lost, self.tested) if self.tested else None

    def no_worse(self, other: Candidate) -> bool:
        """As cheap, as few losses, as near to the full model."""
        return self.ms <= other.ms and self.lost <= other.lost and self.moved <= other.moved


Ask = Callable[[Sequence[Run], Sequence[int]], dict[str, list[Reply] | str]]  # replies by run, or why the run cannot answer


def choose(candidates: Sequence[Candidate], questions: Sequence[int], keep: float | None, ask: Ask) -> list[Candidate]:
    """Successive halving over three rounds of questions; the ladder, the safest (costliest) first. Candidates that leave have a ``reason``."""
    standing = [c for c in candidates if not c.reason]
    for part in _rounds(questions):
        _count(standing, part, ask, testing=False)
        for c in standing:
            if not c.reason and keep is not None and (p := chance(c.lost, c.asked, keep)) <= LEVEL:
                c.reason = f"lost {c.lost} of {c.asked}: as many or more have a chance of {p:.2g} where {keep:.4g} is kept"
        standing = [c for c in standing if not c.reason]
        stay = _best(standing, max(RUNGS, -(-len(standing) // 2)))
        for c in standing:
            if c not in stay:
                c.reason = _beaten(c, stay)
        standing = stay
    if keep is None:
        ladder = sorted(standing, key=lambda c: (c.lost, c.moved, c.ms))[:1]
    else:
        ladder = _spread(_front(standing), RUNGS)
    for c in standing:
        if c not in ladder:
            c.reason = _beaten(c, ladder)
    return sorted(ladder, key=lambda c: -c.ms)


def confirm(ladder: Sequence[Candidate], questions: Sequence[int], losses: int | None, ask: Ask, batch: int) -> Candidate | None:
    """The cheapest rung that passes with all rungs before it; None where the first one fails. ``losses``: what the test allows (None: any)."""
    standing = list(ladder)
    for start in range(0, len(questions), batch):
        _count(standing, questions[start : start + batch], ask, testing=True)
        for place, c in enumerate(standing):
            if not c.reason and losses is not None and c.tested_lost > losses:
                c.reason = f"lost {c.tested_lost} of {c.tested} in the test, which allows {losses} of {len(questions)}"
            if c.reason:
                for behind in standing[place + 1 :]:
                    behind.reason = behind.reason or f"not tested to the end: {c.name}, which should be safer, failed before it"
                standing = standing[:place]
                break
        if not standing:
            return None
    for c in standing[:-1]:
        c.reason = f"holds as well; {standing[-1].name} is cheaper"
    return standing[-1]


def _count(standing: Sequence[Candidate], questions: Sequence[int], ask: Ask, testing: bool) -> None:
    if not standing:
        return
    found = ask([c.run for c in standing], questions)
    for c in standing:
        replies = found[c.name]
        if isinstance(replies, str):
            c.reason = replies
            continue
        lost = [number for number, reply in zip(questions, replies, strict=True) if reply.lost]
        c.losses += lost
        c.moved += sum(reply.divergence for reply in replies)
        if testing:
            c.tested, c.tested_lost = c.tested + len(replies), c.tested_lost + len(lost)
        else:
            c.asked, c.lost = c.asked + len(replies), c.lost + len(lost)


def _rounds(questions: Sequence[int]) -> list[Sequence[int]]:
    """A quarter, a quarter, a half: every round doubles what the survivors have answered."""
    quarter = -(-len(questions) // 4)
    parts = [questions[:quarter], questions[quarter : 2 * quarter], questions[2 * quarter :]]
    return [part for part in parts if part]


def _front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other is at least as good as in cost, losses and divergence; the first of equals."""
    return [
        c
        for place, c in enumerate(candidates)
        if not any(other.no_worse(c) and (not c.no_worse(other) or at < place) for at, other in enumerate(candidates) if other is not c)
    ]


def _spread(front: Sequence[Candidate], count: int) -> list[Candidate]:
    """``count`` of a front, evenly over its costs' order, both ends among them."""
    by_cost = sorted(front, key=lambda c: c.ms)
    if len(by_cost) <= count:
        return by_cost
    if count < 2:
        return by_cost[:count]
    return [by_cost[round(i * (len(by_cost) - 1) / (count - 1))] for i in range(count)]


def _best(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Front after front until there are ``count``."""
    left: list[Candidate] = list(candidates)
    out: list[Candidate] = []
    while left and len(out) < count:
        front = _front(left)
        out += _spread(front, count - len(out))
        left = [c for c in left if c not in front]
    return out


def _beaten(c: Candidate, by: Sequence[Candidate]) -> str:
    better = [other for other in by if other.no_worse(c)]
    if not better:
        return f"halving kept others of its front: lost {c.lost} of {c.asked} at {c.ms:.3g} ms"
    other = min(better, key=lambda each: (each.lost, each.moved))
    return f"{other.name} takes {other.ms:.3g} ms to its {c.ms:.3g}, lost {other.lost} to its {c.lost} of {c.asked}, and is nearer to the full model"
