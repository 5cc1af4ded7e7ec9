"""Columns of tables: each defined once, for markdown and for the page. Values come from the file; only the formatting
is done here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from duet_vlm.evaluation.source import CHANGED, unclean

Run = dict[str, Any]
NOTHING = "-"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def tokens(value: float) -> str:
    return f"{value:.1f}"


def share(value: float) -> str:
    return f"{value:.3f}"


def points(value: float) -> str:
    """A signed difference of shares, in percentage points; a rounded zero has no sign."""
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text


def milliseconds(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def chance(value: float) -> str:
    return "<0.001" if value < 0.0005 else f"{value:.3f}"


def span(interval: Sequence[float] | None, form: Callable[[float], str]) -> str:
    """``0.973-0.981``; where signs occur, ``-0.9 to +0.5``."""
    if interval is None:
        return ""
    low, high = map(form, interval)
    return f"{low} to {high}" if form is points else f"{low}-{high}"


def budget(value: int | float | None) -> str:
    """Format a budget: ``11 %`` of the tokens, ``64 tokens``, or nothing where the method's own settings rule."""
    if value is None:
        return ""
    return f"{value} tokens" if isinstance(value, int) else f"{100 * value:.4g} %"


def name(run: Run) -> str:
    return f"{run['label']} {budget(run['budget'])}".strip()


UNTOLD = ("", "=")  # verdicts on a run that is not told apart from the reference


def verdict(run: Run, sure: float = 0.05) -> str:
    """The difference to the reference in one sign: an arrow where it is significant, adjusted p-value below ``sure``;
    a hollow one where Holm's rule does not agree; "=" where both are level."""
    comparison = run.get("against")
    if not comparison:
        return ""
    if comparison["p_adjusted"] >= sure:
        return "=" if comparison.get("level") else ""
    return ("▲△" if comparison["difference"] > 0 else "▼▽")[comparison.get("p_holm", 0) >= sure]


@dataclass(frozen=True)
class Cell:
    """One entry of a table.

    Parameters
    ----------
    value : float
        The number in the result file, for sorting.
    text : str
        The number as it is written.
    extra : str
        A note beside it, such as its interval; may be empty.
    """

    value: float
    text: str
    extra: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.extra})" if self.extra else self.text


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes
    ----------
    key : str
        Unique name.
    title, help : str
        Head of the column, and its explanation.
    path : tuple of str
        Keys of its number in a run.
    form : callable
        Formats the number.
    beside : callable
        Text beside the number, from the run.
    """

    key: str
    title: str
    help: str
    path: tuple[str, ...]
    form: Callable[[float], str]
    beside: Callable[[Run], str] = lambda run: ""

    def cell(self, run: Run) -> Cell | None:
        """None where the run has no such number (infeasible, or not measured)."""
        value = at(run, *self.path)
        return None if value is None else Cell(value, self.form(value), self.beside(run))


def at(entry: Any, *path: str) -> Any:
    """``entry[a][b]...``; None where any of it is absent or null."""
    for key in path:
        entry = entry.get(key) if isinstance(entry, dict) else None
    return entry


NOMINAL = Column(
    "nominal",
    "nominal tokens",
    "Visual tokens per decoder layer that the solved schedule promises, mean per question",
    ("tokens", "nominal"),
    tokens,
)
MEASURED = Column(
    "measured",
    "measured tokens",
    "Visual tokens that were really at each decoder layer's input, mean over layers and questions",
    ("tokens", "measured"),
    tokens,
)
ACCURACY = Column(
    "accuracy",
    "accuracy",
    "Share of right answers, 95 % score interval",
    ("accuracy",),
    share,
    lambda run: span(run["interval"], share),
)
KEPT = Column(
    "kept",
    "kept, %",
    "Accuracy as a share of the full model's on the same questions, 95 % paired score interval",
    ("kept",),
    percent,
    lambda run: span(run.get("kept_interval"), percent),
)
OF_ORACLE = Column(
    "of_oracle",
    "of oracle, %",
    "Accuracy as a share of the oracle's at the same budget; the oracle is given what the answer needs",
    ("of_oracle",),
    percent,
)
P_VALUE = Column(
    "p",
    "adjusted p",
    "Exact McNemar test against the reference at the same budget, Benjamini-Hochberg over all tests of the file",
    ("against", "p_adjusted"),
    chance,
)
RECALL = (
    Column(
        "entry",
        "recall at entry, %",
        "Of the patches that an answer needs, the share that enters the decoder",
        ("recall", "entry"),
        percent,
    ),
    Column(
        "merged",
        "recall with merged, %",
        "The same, with those merged into a kept row",
        ("recall", "entry_or_merged"),
        percent,
    ),
    Column(
        "middle",
        "recall midway, %",
        "The share that is still a row of its own halfway through the decoder",
        ("recall", "middle"),
        percent,
    ),
)
COST = (
    Column("flops", "FLOPs, %", "Arithmetic per question as a share of the full model's", ("flops_share",), percent),
    Column("kv", "KV cache, %", "Bytes of the cache as a share of the full model's", ("kv_share",), percent),
    Column(
        "ms",
        "prefill, ms",
        "Measured time per question from pixels to the first token, median and quartiles",
        ("prefill", "ms"),
        milliseconds,
        lambda run: span((run["prefill"]["low"], run["prefill"]["high"]), milliseconds),
    ),
    Column(
        "ratio",
        "time ratio",
        "Prefill time over the full model's, paired rounds, 95 % interval of the median",
        ("prefill", "ratio"),
        share,
        lambda run: span(run["prefill"]["ratio_interval"], share),
    ),
)


def reference(result: dict[str, Any]) -> str:
    """Label of the run that the others are tested against."""
    return str(result["experiment"].get("against") or "the reference")


def difference(result: dict[str, Any]) -> Column:
    other = reference(result)
    return Column(
        "difference",
        f"difference to {other}, points",
        f"Accuracy minus that of {other} at the same budget on the same questions, 95 % paired score interval",
        ("against", "difference"),
        points,
        lambda run: span(run["against"]["interval"], points),
    )


def kinds(result: dict[str, Any]) -> list[str]:
    """Kinds of questions, in the order of the full model's row."""
    return list(result["runs"][0]["kinds"])


def kind(key: str) -> Column:
    """Accuracy on one kind of questions; beside it, the share kept of the full model's."""

    def kept(run: Run) -> str:
        value = at(run, "kinds", key, "kept")
        return "" if value is None else f"{percent(value)} %"

    meaning = f"Accuracy on {key} questions, and the share of the full model's that is kept"
    return Column(f"kind:{key}", key, meaning, ("kinds", key, "accuracy"), share, kept)


def ordered(result: dict[str, Any]) -> list[Run]:
    """The full model, runs with settings of their own, then budget by budget from large to small; else in the order of
    the file."""
    first, *others = result["runs"]
    unreduced = first["tokens"]["unreduced"]

    def fraction(run: Run) -> float:
        value = run["budget"]
        return 2.0 if value is None else value if isinstance(value, float) else value / unreduced

    return [first, *sorted(others, key=fraction, reverse=True)]


def places(result: dict[str, Any]) -> dict[str, int]:
    """Place of every label among the cells of the experiment: runs that lack the larger budgets stand where they were
    written."""
    cells = result["experiment"].get("cells") or []
    return {
        label: number
        for number, label in reversed(list(enumerate(cell.get("label") or cell.get("method") for cell in cells)))
    }


def best(result: dict[str, Any], references: frozenset[str]) -> list[tuple[str, list[Run]]]:
    """(budget, runs) of the methods that keep the most at each budget, from large to small: one, or all that are right
    equally often, those on fewer tokens first. Methods named in ``references`` are left out."""
    groups: dict[str, list[Run]] = {}
    for run in ordered(result)[1:]:
        if run["status"] == "ok" and run["method"] not in references and budget(run["budget"]):
            groups.setdefault(budget(run["budget"]), []).append(run)
    most = {each: max(run["accuracy"] for run in runs) for each, runs in groups.items()}
    fewest = {each: sorted(runs, key=lambda run: run["tokens"]["measured"]) for each, runs in groups.items()}
    return [(each, [run for run in runs if math.isclose(run["accuracy"], most[each])]) for each, runs in fewest.items()]


def leaders(result: dict[str, Any], references: frozenset[str], most: int) -> list[str]:
    """Labels of up to ``most`` methods: the reference, those that keep the most at one of the budgets, then the second
    of each, and so on."""
    groups: dict[str, list[Run]] = {}
    for run in ordered(result)[1:]:
        if run["status"] == "ok" and run["method"] not in references:
            groups.setdefault(budget(run["budget"]), []).append(run)
    ranked = [sorted(runs, key=lambda run: (-run["accuracy"], run["tokens"]["measured"])) for runs in groups.values()]
    labels = [run["label"] for rank in zip_longest(*ranked) for run in rank if run]
    return list(dict.fromkeys([label for label in labels if label == reference(result)] + labels))[:most]


def refusal(run: Run) -> str:
    """Text in place of numbers: ``infeasible, floor 21.3``."""
    floor = run.get("floor")
    return run["status"] if floor is None else f"{run['status']}, floor {tokens(floor)}"


def facts(result: dict[str, Any]) -> str:
    """Number of questions and code of a result; a second sentence where no commit has that code."""
    questions, seeds = result["questions"], result["experiment"].get("seeds") or []
    each = f", {questions['per_seed']:,} for each of the seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
    commit = str(result["environment"].get("commit") or "")
    code = f", by the code of commit {commit.removesuffix(CHANGED)}" if commit else ""
    text = f"{questions['count']:,} questions of task {result['task']}{each}, on model {result['model'].get('name', 'unknown')}{code}."
    return f"{text} {warning}" if (warning := unclean(commit)) else text
