"""The tables of docs/comparison.md, from the result files under comparison/."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from duet_vlm.evaluate.results import load

ROOT = Path(__file__).resolve().parent.parent / "comparison"
SURE = 0.05  # adjusted p-value below which a difference is marked

Row = dict[str, Any]


def rows_of(task: str, name: str) -> list[Row]:
    return load(ROOT / task / "results" / f"{name}.json")["runs"]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def kept(row: Row) -> str:
    """Percent kept with its interval; an arrow where the difference to the reference is beyond doubt."""
    low, high = row["kept_interval"]
    return f"{row['kept']:.1%}{mark(row)} ({low:.1%} to {high:.1%})".replace("%", "")


def mark(row: Row) -> str:
    found = row["against"]
    if found is None or found["p_adjusted"] >= SURE:
        return ""
    return " ▲" if found["difference"] > 0 else " ▼"


def grid(task: str, name: str, cell: Callable[[Row], str] = kept) -> str:
    """Runs by budget."""
    runs = [row for row in rows_of(task, name) if row["budget"] is not None]
    budgets = list(dict.fromkeys(row["budget"] for row in runs))
    lines = []
    for label in dict.fromkeys(row["label"] for row in runs):
        own = {row["budget"]: row for row in runs if row["label"] == label}
        cells = [cell(own[b]) if own[b]["status"] == "ok" else f"floor {own[b]['floor'] / 256:.0%}" if b in own else "-" for b in budgets]
        lines.append([f"`{label}`" if label == own[budgets[0]]["method"] else label, *cells])
    return table(["", *(f"{b:.0%}" for b in budgets)], lines)


def kinds(task: str, name: str, budget: float) -> str:
    """Accuracy per kind of question at one budget, the full model first."""
    runs = [row for row in rows_of(task, name) if row["status"] == "ok" and row["budget"] in (None, budget)]
    names = list(runs[0]["kinds"])
    lines = [[row["label"], *(f"{row['kinds'][kind]['accuracy']:.3f}" for kind in names), f"{row['accuracy']:.3f}"] for row in runs]
    return table(["", *names, "all"], lines)


def recall(task: str, name: str, budget: float) -> str:
    """Needed tokens that are left, and accuracy relative to the oracle."""
    runs = [row for row in rows_of(task, name) if row["status"] == "ok" and row["budget"] == budget]
    lines = []
    for row in runs:
        found = row["recall"]
        shares = [found["entry"], found["entry_or_merged"], found["middle"], row["of_oracle"]]
        lines.append([row["label"], f"{row['solved']['entry']}", *(f"{share:.1%}" for share in shares)])
    return table(["", "tokens entering", "needed: enter", "enter or merged", "alive at half depth", "accuracy / oracle's"], lines)


def ablation(group: str) -> str:
    """One group of DUET's settings beside the default, at equal measured means."""
    runs = rows_of("tiny-crowded", "ablations")
    lines = []
    for row in runs:
        is_default = row["label"] == "duet"
        if row["status"] == "ok" and (is_default or row["label"].startswith(f"{group}: ")):
            lines.append((row["beside"], not is_default, row))
    out = []
    for beside, other, row in sorted(lines, key=lambda line: (-line[0], line[1])):
        name = row["label"].partition(": ")[2] if other else "default"
        difference = "-"
        if row["against"]:
            low, high = row["against"]["interval"]
            difference = f"{100 * row['against']['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}){mark(row)}"
        entering = f"{row['solved']['dominant']} + {row['solved']['contextual']}"
        out.append([f"{beside:.0%}", name, entering, f"{row['tokens']['measured']:.1f}", f"{row['accuracy']:.3f}", difference])
    return table(["budget", group, "dominant + contextual", "measured tokens", "accuracy", "points against the default"], out)


def guided_and_not(task: str) -> str:
    """Kept on the shipped checkpoint and on the one finished without attention supervision."""
    guided = {row["id"]: row for row in rows_of(task, "methods")}
    runs = [row for row in rows_of(task, "unguided") if row["status"] == "ok" and row["budget"] is not None]
    budgets = list(dict.fromkeys(row["budget"] for row in runs))
    lines = []
    for label in dict.fromkeys(row["label"] for row in runs):
        own = {row["budget"]: row for row in runs if row["label"] == label}
        cells = [f"{guided[own[b]['id']]['kept']:.1%} / {own[b]['kept']:.1%}{mark(own[b])}" if b in own else "-" for b in budgets]
        lines.append([label, *cells])
    return table(["shipped / unguided", *(f"{b:.0%}" for b in budgets)], lines)


def cost(task: str, name: str) -> str:
    """Measured prefill time beside the share of FLOPs."""

    def cell(row: Row) -> str:
        low, high = row["prefill"]["ratio_interval"]
        return f"{row['prefill']['ratio']:.2f} ({low:.2f}-{high:.2f}), FLOPs {row['flops_share']:.2f}"

    return grid(task, name, cell)


GROUPS = ("queries", "positions", "cluster width", "contextual share", "stages", "schedule")
BLOCKS: dict[str, Callable[[], str]] = {
    "compare_tiny": lambda: grid("tiny", "methods"),
    "compare_crowded": lambda: grid("tiny-crowded", "methods"),
    "kinds_crowded": lambda: kinds("tiny-crowded", "methods", 0.07),
    "recall_crowded": lambda: recall("tiny-crowded", "methods", 0.07),
    "unguided_tiny": lambda: guided_and_not("tiny"),
    "unguided_crowded": lambda: guided_and_not("tiny-crowded"),
    "cost_tiny": lambda: cost("tiny", "methods"),
    **{f"ablation_{group.replace(' ', '_')}": lambda group=group: ablation(group) for group in GROUPS},
}
