"""Tables made from the results of the lab: those of the comparison and of the studies. ``tables.py`` writes them into
the pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import chain_tables
import comparison_tables
import compressor_tables
import page_tables
import tower_tables
import training_tables
import tune_tables
import video_tables
from folders import COMPARISON, STUDIES

from duet_vlm.evaluation.report import columns, markdown
from duet_vlm.evaluation.results import load


def comparison(task: str, form: Callable[[dict[str, Any]], str]) -> str:
    """A table of lab/comparison/<task>: every method at every budget."""
    return form(load(COMPARISON / task / "results" / "methods.json"))


def importance() -> str:
    """Accuracy by the rows that ask, and points against all of them."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in json.loads((STUDIES / "importance.json").read_text())["results"]:
        method, who = row["label"].split(", ")
        more = row["against"]
        told = (
            ""
            if more is None
            else f", {columns.points(more['difference'])} ({columns.span(more['interval'], columns.points)})"
        )
        found.setdefault((row["task"], method, f"{row['budget']:.0%}"), {})[who] = columns.share(row["accuracy"]) + told
    asks = list(next(iter(found.values())))
    lines = [[f"`{task}`", method, budget, *cells.values()] for (task, method, budget), cells in found.items()]
    head = ["task", "method", "budget", *asks]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


BLOCKS: dict[str, Callable[[], str]] = {
    "kept_tiny": lambda: comparison("tiny", markdown.matrix),
    "kept_chain": lambda: comparison("tiny-chain", markdown.matrix),
    "kept_crowded": lambda: comparison("tiny-crowded", markdown.matrix),
    "kept_long": lambda: comparison("tiny-long", markdown.matrix),
    "more_long": lambda: markdown.matrix(load(COMPARISON / "tiny-long" / "results" / "more.json")),
    "importance": importance,
    **chain_tables.BLOCKS,
    **comparison_tables.BLOCKS,
    **compressor_tables.BLOCKS,
    **page_tables.BLOCKS,
    **tower_tables.BLOCKS,
    **training_tables.BLOCKS,
    **tune_tables.BLOCKS,
    **video_tables.BLOCKS,
}
