"""Tables of lab/NOTEBOOK.md about pages of four crops."""

from __future__ import annotations

import json
from collections.abc import Callable

import comparison_tables
from folders import COMPARISON

from duet_vlm.evaluation.report import markdown
from duet_vlm.evaluation.report.markdown import table
from duet_vlm.evaluation.results import load
from duet_vlm_lab.generators.page_questions import CHANCE, KINDS
from duet_vlm_lab.tasks import page

HOME = COMPARISON / "tiny-page"
SHOWN_LESSONS = ("at", "quarter")


def shown() -> str:
    """Accuracy by kind with all rows, with the overview alone and with the crops alone."""
    found = json.loads((HOME / "overview.json").read_text())
    guess = {"best guess": {"all": sum(CHANCE.values()) / len(CHANCE), **CHANCE}}
    rows = [
        [name, *(f"{row[kind]:.2f}" for kind in ("all", *KINDS))] for name, row in (guess | found["accuracy"]).items()
    ]
    told = f"{found['questions']} questions of seed {found['seed']}, by the code of commit {found['environment']['commit']}."
    return table(["accuracy", "all", *KINDS], rows) + "\n\n" + told


def learned() -> str:
    """Validation accuracy on whole pages, as training went on."""
    lines = [line for line in json.loads((page.path() / "training_log.json").read_text())["curve"] if "val_all" in line]
    columns = ("all", *KINDS, *SHOWN_LESSONS)
    return table(
        ["step", *columns],
        [[f"{line['step']:,}", *(f"{line[f'val_{kind}']:.2f}" for kind in columns)] for line in lines],
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "page_shown": shown,
    "page_learned": learned,
    "page_curve": lambda: comparison_tables.curve("tiny-page/results/drop-curve.json"),
    "page_kept": lambda: markdown.matrix(load(HOME / "results" / "methods.json")),
    "page_kinds": lambda: comparison_tables.kinds("tiny-page", "methods", 0.11),
}
