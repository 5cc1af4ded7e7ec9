"""Successive halving: candidates answer ever more questions, hopeless ones are dropped with a reason, and a ladder of
the rest is tested.

Candidates within the goal rank before all others, so that the cheapest setting that holds is found. Choosing and
testing never share a question. The ladder is tested from its safest rung to its cheapest, each at the full level, and
ends at the first that fails (a fixed sequence of hypotheses, so the chance of a wrong rung at the end is at most the
level, however many there are).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from duet_vlm.evaluation.experiment import ExperimentCell
from duet_vlm.evaluation.tune.binomial import LEVEL, chance, lower_bound, percent

RUNGS = 6  # of the ladder, at most


@dataclass(frozen=True)
class AnswerScore:
    """Score of one answer: True in ``lost`` if the full model's right answer was lost, and the KL divergence (nats) of
    the first answer token."""

    lost: bool
    divergence: float


@dataclass
class Candidate:
    """A setting and its results so far.

    Attributes
    ----------
    run : ExperimentCell
        The setting.
    ms : float
        Measured time to the first token.
    asked, lost, moved : int, int, float
        Questions answered while choosing, answers lost, and the sum of divergences.
    tested, tested_lost : int
        Questions of the test answered, and answers lost.
    reason : str
        Reason for dropping it, empty while it is in the search.
    losses : list of int
        Numbers of the questions whose answers were lost.
    """

    run: ExperimentCell
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
        trials = self.asked + self.tested
        return 1 - (self.lost + self.tested_lost) / trials if trials else None

    @property
    def bound(self) -> float | None:
        """Lower bound from the test alone: questions that chose the candidate do not count."""
        return lower_bound(self.tested - self.tested_lost, self.tested) if self.tested else None

    def no_worse(self, other: Candidate) -> bool:
        """At most the other's time, losses and divergence."""
        return self.ms <= other.ms and self.lost <= other.lost and self.moved <= other.moved


# replies by run, or why the run cannot answer
Ask = Callable[[Sequence[ExperimentCell], Sequence[int]], dict[str, list[AnswerScore] | str]]


def choose(candidates: Sequence[Candidate], questions: Sequence[int], keep: float | None, ask: Ask) -> list[Candidate]:
    """Successive halving over three rounds of questions; returns the ladder, the safest (costliest) first. Dropped
    candidates have a ``reason``.

    In each round candidates with no more losses than ``keep`` allows are kept first. None of the ladder is beyond that,
    unless all are.
    """
    standing = [c for c in candidates if not c.reason]
    for part in _rounds(questions):
        _count(standing, part, ask, testing=False)
        for c in standing:
            if not c.reason and keep is not None and (p := chance(c.lost, c.asked, keep)) <= LEVEL:
                c.reason = f"lost {c.lost} of {c.asked}: where {percent(keep)} are kept, so many have a chance of {percent(p, 1)}"
        standing = [c for c in standing if not c.reason]
        standing = _leaving(standing, _best(standing, max(RUNGS, -(-len(standing) // 2)), keep), keep)
    if keep is None:
        ladder = sorted(standing, key=lambda c: (c.lost, c.moved, c.ms))[:1]
    else:
        ladder = _spread(_front(next(filter(None, _by_goal(standing, keep)), [])), RUNGS)
    return sorted(_leaving(standing, ladder, keep), key=lambda c: -c.ms)


def confirm(
    ladder: Sequence[Candidate], questions: Sequence[int], losses: int | None, ask: Ask, batch: int
) -> Candidate | None:
    """The cheapest rung that passes with all rungs before it; None where the first one fails. ``losses``: largest
    number that the test allows (None: any)."""
    standing = list(ladder)
    for start in range(0, len(questions), batch):
        _count(standing, questions[start : start + batch], ask, testing=True)
        for number, c in enumerate(standing):
            if not c.reason and losses is not None and c.tested_lost > losses:
                c.reason = f"lost {c.tested_lost} of {c.tested} in the test, which allows {losses} of {len(questions)}"
            if c.reason:
                for behind in standing[number + 1 :]:
                    behind.reason = (
                        behind.reason or f"not tested to the end: {c.name}, which should be safer, failed before it"
                    )
                standing = standing[:number]
                break
        if not standing:
            return None
    for c in standing[:-1]:
        c.reason = f"holds as well; {standing[-1].name} is faster"
    return standing[-1]


def _count(standing: Sequence[Candidate], questions: Sequence[int], ask: Ask, testing: bool) -> None:
    if not standing:
        return
    by_name = ask([c.run for c in standing], questions)
    for c in standing:
        replies = by_name[c.name]
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
    """A quarter, a quarter, a half: every round doubles the answers of the survivors."""
    quarter = -(-len(questions) // 4)
    parts = [questions[:quarter], questions[quarter : 2 * quarter], questions[2 * quarter :]]
    return [part for part in parts if part]


def _front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The Pareto front of time, losses and divergence; the first of equals."""
    return [
        c
        for number, c in enumerate(candidates)
        if not any(
            other.no_worse(c) and (not c.no_worse(other) or at < number)
            for at, other in enumerate(candidates)
            if other is not c
        )
    ]


def _by_goal(candidates: Sequence[Candidate], keep: float | None) -> tuple[list[Candidate], list[Candidate]]:
    """Candidates with no more losses than ``keep`` allows, and the others."""
    within = [c for c in candidates if keep is None or c.lost <= (1 - keep) * c.asked + 1e-9]
    return within, [c for c in candidates if c not in within]


def _spread(front: Sequence[Candidate], count: int) -> list[Candidate]:
    """``count`` of a front, evenly over the order of their times; the cheapest with the fewest losses is always among
    them."""
    by_cost = sorted(front, key=lambda c: c.ms)
    if len(by_cost) <= count:
        return by_cost
    if count < 1:
        return []
    sure = min(range(len(by_cost)), key=lambda number: by_cost[number].lost)  # the first of equals is the cheapest
    places = [round(i * (len(by_cost) - 1) / max(1, count - 1)) for i in range(count)]
    if sure not in places:
        places[min(range(count), key=lambda i: abs(places[i] - sure))] = sure
    return [by_cost[number] for number in places]


def _best(candidates: Sequence[Candidate], count: int, keep: float | None) -> list[Candidate]:
    """Front after front until there are ``count``, first of those within the goal."""
    out: list[Candidate] = []
    for left in _by_goal(candidates, keep):
        while left and len(out) < count:
            front = _front(left)
            out += _spread(front, count - len(out))
            left = [c for c in left if c not in front]
    return out


def _leaving(standing: Sequence[Candidate], stay: Sequence[Candidate], keep: float | None) -> list[Candidate]:
    """Those that stay; the others get their reason."""
    within, _ = _by_goal(standing, keep)
    for c in standing:
        if c not in stay:
            better = [other for other in stay if other.no_worse(c)]
            c.reason = f"{c.ms:.3g} ms, {c.lost} of {c.asked} lost: "
            if better:
                other = min(better, key=lambda each: (each.lost, each.moved))
                c.reason += f"{other.name} is as good or better in both ({other.ms:.3g} ms, {other.lost} lost) and nearer to the full model"
            elif keep is not None and c not in within:
                c.reason += f"more than {percent(keep)} kept allows; others are within it"
            elif keep is None:
                c.reason += "others kept more or stayed nearer to the full model"
            else:
                c.reason += f"left out for room, as good as the {len(stay)} that went on"
    return list(stay)
