"""A result on the terminal."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from rich.console import Console
from rich.table import Table

import duet_vlm
from duet_vlm.evaluate.source import unclean
from duet_vlm.measure.report import in_runs

WIDTH = 150  # where the output goes to a file


def show(result: dict[str, Any]) -> None:
    """The main table, the kinds of question, and the settings that every run used."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    asked = result["questions"]
    judged = f", {n} of them judged by the full model's answer" if (n := asked.get("unlabelled")) else ""
    main = Table(title=f"{result['task']}: {asked['count']} questions{judged}, 95 % bootstrap intervals", title_justify="left")
    kinds = Table()
    for column in ("run", "nominal tokens", "measured", "accuracy", "interval", "kept", "FLOPs", "KV", "prefill ms", "needed kept"):
        main.add_column(column, justify="left" if column == "run" else "right")
    for column in ("run", *asked["kinds"]):
        kinds.add_column(column, justify="left" if column == "run" else "right")
    for run in result["runs"]:
        name = title(run)
        if run["status"] != "ok":
            main.add_row(name, "infeasible" if run["floor"] is None else f"infeasible, floor {run['floor']:.1f}")
            continue
        low, high = run["interval"]
        tokens, prefill, recall = run["tokens"], run["prefill"], run["recall"]
        main.add_row(
            name, f"{tokens['nominal']:.1f}", f"{tokens['measured']:.1f}", f"{run['accuracy']:.3f}", f"{low:.3f}-{high:.3f}",
            _percent(run["kept"], 1), _percent(run["flops_share"]), _percent(run["kv_share"]),
            "-" if prefill is None else f"{prefill['ms']:.2f}", _percent(recall and recall["entry"]),
        )  # fmt: skip
        kinds.add_row(name, *(f"{kind['accuracy']:.3f}" for kind in run["kinds"].values()))
    console.print(main)
    console.print("accuracy by kind of question", style="italic", highlight=False)  # as a title it would be as narrow as the table
    console.print(kinds)
    console.print("visual tokens per layer, and settings other than the defaults:")
    for run in result["runs"]:
        if run["status"] == "ok":
            console.print(f"  {title(run):<36} {settings(run)}", highlight=False, markup=False, soft_wrap=True)
    if warning := unclean(result["environment"].get("commit")):
        console.print(warning, style="bold", highlight=False, markup=False, soft_wrap=True)


def title(run: dict[str, Any]) -> str:
    """Label and budget."""
    budget = run["budget"]
    return run["label"] + ("" if budget is None else f" {budget:.0%}" if isinstance(budget, float) else f" {budget}")


def settings(run: dict[str, Any]) -> str:
    """What the budget was solved to (layer counts, merged rows), and what is set differently from the method's defaults."""
    words = []
    if run["solved"]:
        words.append(in_runs(run["solved"]["counts"]) + f" of {run['solved']['tokens']}")
        if run["solved"]["contextual"]:
            words.append(f"{run['solved']['dominant']} dominant + {run['solved']['contextual']} contextual")
    defaults = _defaults(run["method"])
    words += [f"{key}={value}" for key, value in run["settings"].items() if key not in defaults or defaults[key] != value]
    return "; ".join(words)


def _defaults(method: str) -> dict[str, Any]:
    """Of a method or composition; nothing for one that is not installed here."""
    try:
        return {f.name: f.default for f in fields(duet_vlm.get(method)) if f.default is not MISSING}
    except ValueError:
        return {}


def _percent(share: float | None, digits: int = 0) -> str:
    return "-" if share is None else f"{share:.{digits}%}"
