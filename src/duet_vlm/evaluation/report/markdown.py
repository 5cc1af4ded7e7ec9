"""Markdown tables of a result."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from duet_vlm.evaluation.report import columns
from duet_vlm.evaluation.report.columns import Column
from duet_vlm.evaluation.report.style import one_line

ORACLE = "`oracle` is no method but a reference: it is told which patches the answer needs."
NOTE_KEPT = (
    "Brackets hold 95 % intervals (score intervals, paired); ▲ and ▼ differ from the reference method at that budget (adjusted p < .05; "
    "hollow where Holm's rule does not agree), = is level with it within 2 points; "
    f"infeasible budgets give the method's floor in tokens. {ORACLE}"
)
NOTE = (
    "Tokens are means per decoder layer and question. Brackets hold 95 % score intervals; those of kept and difference compare the same "
    f"questions; those of prefill ms are quartiles. {ORACLE}"
)


def escape(text: str) -> str:
    """Escape text so that markdown shows it unchanged, on one line: for labels, which come from a file."""
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown table of cells as they are; text from a file is to be escaped before."""
    head = list(head)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def runs_table(result: dict[str, Any], shown: Sequence[Column]) -> str:
    """One row per run; an infeasible one has its floor in the first column."""
    rows = []
    for run in columns.ordered(result):
        cells = [str(cell) if (cell := column.cell(run)) else columns.NOTHING for column in shown]
        if run["status"] != "ok":
            cells[0] = escape(columns.refusal(run))
        rows.append([escape(columns.name(run)), *cells])
    return table(["run", *(escape(column.title) for column in shown)], rows)


def compact(result: dict[str, Any]) -> str:
    """The short table of README and docs: tokens, accuracy, kept, and accuracy by kind."""
    kinds = [
        columns.Column(f"kind:{key}", key, "", ("kinds", key, "accuracy"), lambda value: f"{value:.2f}")
        for key in columns.kinds(result)
    ]
    text = runs_table(result, [columns.MEASURED, columns.ACCURACY, columns.KEPT, *kinds])
    return f"{text}\n\n{facts(result)} {NOTE}"


def matrix(result: dict[str, Any]) -> str:
    """The short overview: rows are labels, columns budgets, cells the accuracy kept with its interval, or the floor."""
    runs = columns.ordered(result)[1:]
    budgets = list(dict.fromkeys(columns.budget(run["budget"]) or "own settings" for run in runs))
    cells: dict[str, dict[str, str]] = {}
    for run in runs:
        said = (
            f"{columns.KEPT.cell(run) or columns.NOTHING} {columns.verdict(run)}".strip()
            if run["status"] == "ok"
            else columns.refusal(run)
        )
        cells.setdefault(run["label"], {})[columns.budget(run["budget"]) or "own settings"] = escape(said)
    places = columns.places(result)
    labels = sorted(cells, key=lambda label: places.get(label, len(places)))
    rows = [[escape(label), *(cells[label].get(budget, columns.NOTHING) for budget in budgets)] for label in labels]
    text = table(["kept, % of the full model's accuracy, at", *budgets], rows)
    full = columns.ACCURACY.cell(result["runs"][0])
    return f"{text}\n\n{facts(result)} The full model's accuracy is {full}. {NOTE_KEPT}"


def facts(result: dict[str, Any]) -> str:
    return escape(columns.facts(result))


def page(result: dict[str, Any], plots: Sequence[tuple[str, str]], again: str) -> str:
    """Everything about one result: tables, plots (caption, file) and the command that writes this page anew."""
    compared = [columns.difference(result), columns.P_VALUE]
    shown = {
        "Accuracy": [columns.NOMINAL, columns.MEASURED, columns.ACCURACY, columns.KEPT, columns.OF_ORACLE, *compared],
        "Cost, and needed patches that are still there": [columns.MEASURED, *columns.COST, *columns.RECALL],
        "Kinds of questions: accuracy (and share of the full model's)": [
            columns.MEASURED,
            *map(columns.kind, columns.kinds(result)),
        ],
    }
    parts = [f"# {escape(result['name'])}", matrix(result), "## Every number", NOTE]
    for title, some in shown.items():
        parts += [f"### {title}", runs_table(result, some)]
    parts += ["## Plots", *(f"![{escape(caption)}]({file})" for caption, file in plots)]
    made = [f"{escape(str(key))} {escape(str(value))}" for key, value in result["environment"].items()]
    parts += ["## How it was made", "; ".join(made) + ".", f"```bash\n{again}\n```"]
    return "\n\n".join(parts) + "\n"
