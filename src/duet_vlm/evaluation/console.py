"""A result on the terminal."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import duet_vlm
from duet_vlm.evaluation.source import unclean
from duet_vlm.profiling.report import run_lengths
from duet_vlm.utils.field_types import flattened

WIDTH = 150  # where the output goes to a file


def console(usual: int = WIDTH) -> Console:
    """As wide as the terminal; where the output goes elsewhere as wide as COLUMNS says, else ``default_width``."""
    screen = Console(highlight=False)
    return (
        screen
        if screen.is_terminal or os.environ.get("COLUMNS", "").isdecimal()
        else Console(highlight=False, width=usual)
    )


def show(result: dict[str, Any]) -> None:
    """The main table, the kinds of question, and the settings that every run used."""
    screen, questions, done = console(), result["questions"], [run for run in result["runs"] if run["status"] == "ok"]
    judged = f", {n} of them judged by the full model's answer" if (n := questions.get("unlabelled")) else ""
    columns = {name: cell for name, cell in CELLS.items() if any(cell(run) != "-" for run in done)}
    main, kinds = Table(), Table()
    for table, names in ((main, columns), (kinds, questions["kinds"])):
        for column in ("run", *names):
            table.add_column(column, justify="left" if column == "run" else "right")
    for run in result["runs"]:
        name = title(run)
        if run["status"] != "ok":
            main.add_row(name, "infeasible" if run["floor"] is None else f"infeasible, floor {run['floor']:.1f}")
            continue
        main.add_row(name, *(cell(run) for cell in columns.values()))
        kinds.add_row(name, *(f"{kind['accuracy']:.3f}" for kind in run["kinds"].values()))
    above = f"{result['task']}: {questions['count']} questions{judged}, 95 % intervals"
    for words, table in ((above, main), ("accuracy by kind of question", kinds)):
        # a table's own title is no wider than the table
        screen.print(f"[italic]{escape(words)}[/italic]", soft_wrap=True)
        screen.print(table)
    screen.print("visual tokens per layer, and settings other than the defaults:")
    for run in done:
        screen.print(f"  {title(run):<36} {settings(run)}", markup=False, soft_wrap=True)
    if warning := unclean(result["environment"].get("commit")):
        screen.print(warning, markup=False, soft_wrap=True)


def title(run: dict[str, Any]) -> str:
    """Label and budget."""
    budget = run["budget"]
    return run["label"] + ("" if budget is None else f" {budget:.0%}" if isinstance(budget, float) else f" {budget}")


def settings(run: dict[str, Any]) -> str:
    """The solved budget (layer counts, merged tokens), and settings other than the method's defaults."""
    words = []
    if run["solved"]:
        words.append(run_lengths(run["solved"]["counts"]) + f" of {run['solved']['tokens']}")
        if run["solved"]["contextual"]:
            words.append(f"{run['solved']['dominant']} dominant + {run['solved']['contextual']} contextual")
    defaults = flattened(_defaults(run["method"]))
    words += [
        f"{key}={value}"
        for key, value in flattened(run["settings"]).items()
        if key not in defaults or defaults[key] != value
    ]
    return "; ".join(words)


def _defaults(method: str) -> dict[str, Any]:
    """Default settings of a method or composition; nothing for one that is not installed here."""
    try:
        return duet_vlm.make_method(method).settings()
    except ValueError:
        return {}


def _percent(share: float | None, digits: int = 0) -> str:
    return "-" if share is None else f"{share:.{digits}%}"


CELLS: dict[str, Callable[[dict[str, Any]], str]] = {  # the main table's columns; "-" where a result does not know
    "nominal tokens": lambda run: f"{run['tokens']['nominal']:.1f}",
    "measured": lambda run: f"{run['tokens']['measured']:.1f}",
    "accuracy": lambda run: f"{run['accuracy']:.3f}",
    "interval": lambda run: "{:.3f}-{:.3f}".format(*run["interval"]),
    "kept": lambda run: _percent(run["kept"], 1),
    "FLOPs": lambda run: _percent(run["flops_share"]),
    "KV": lambda run: _percent(run["kv_share"]),
    "prefill ms": lambda run: "-" if run["prefill"] is None else f"{run['prefill']['ms']:.2f}",
    "needed kept": lambda run: _percent(run["recall"] and run["recall"]["entry"]),
}
