"""Answers of ``tiny-page`` from the overview of a page alone, and from its crops alone: ``python
lab/studies/page_overview.py [weights]``.

The other rows leave in front of the decoder, by the reference that keeps what it is told to keep; writes
lab/comparison/tiny-page/overview.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from duet_vlm.api.loading import LoadedModel, load
from duet_vlm.evaluation.experiment import BASELINE, ORACLE, ExperimentCell
from duet_vlm.evaluation.results import environment
from duet_vlm.evaluation.run_sample import answer
from duet_vlm.evaluation.tasks import TaskQuestion, right, task
from duet_vlm_lab.generators.page_questions import KINDS
from duet_vlm_lab.generators.page_scenes import OVERVIEW, ROWS

HOME = Path(__file__).resolve().parents[1] / "comparison" / "tiny-page"
FULL, ALONE, CROPS = "full model", "overview alone", "crops alone"
BATCH = 20


def shares(questions: list[TaskQuestion], said: Callable[[list[TaskQuestion]], tuple[str, ...]]) -> dict[str, float]:
    """Share of right answers, and by kind."""
    hits: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for first in range(0, len(questions), BATCH):
        some = questions[first : first + BATCH]
        for question, text in zip(some, said(some), strict=True):
            hits[question.kind].append(right(question, text))
    every = [hit for mine in hits.values() for hit in mine]
    return {
        "all": round(float(np.mean(every)), 4),
        **{kind: round(float(np.mean(mine)), 4) for kind, mine in hits.items()},
    }


def measure(loaded: LoadedModel, questions: list[TaskQuestion], tokens: int) -> dict[str, dict[str, float]]:
    """Accuracy with all rows, with those of the overview, and with those of the crops."""
    overview = np.arange(ROWS) < OVERVIEW
    sides = {FULL: (ExperimentCell(BASELINE), None)}
    sides |= {
        name: (ExperimentCell(ORACLE, int(rows.sum())), rows) for name, rows in ((ALONE, overview), (CROPS, ~overview))
    }

    def asked(run: ExperimentCell, rows: np.ndarray | None) -> Callable[[list[TaskQuestion]], tuple[str, ...]]:
        def said(some: list[TaskQuestion]) -> tuple[str, ...]:
            some = some if rows is None else [replace(question, needed=rows) for question in some]
            return answer(loaded, [run], some, tokens)[run.id].answers

        return said

    return {name: shares(questions, asked(*side)) for name, side in sides.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model", nargs="?", default="tiny-page", help="the embedded model, or the folder of one that you trained"
    )
    parser.add_argument("--limit", type=int, default=350, help="questions, the kinds in turn")
    parser.add_argument("--seed", type=int, default=100, help="stream of questions; one that nothing was tuned on")
    parser.add_argument("--out", type=Path, default=HOME, help="folder for overview.json")
    options = parser.parse_args()
    pages = task("tiny-page")
    found = measure(
        load(options.model, "cpu"),
        [pages.ask(options.seed, index) for index in range(options.limit)],
        pages.max_new_tokens,
    )
    made = {
        "accuracy": found,
        "questions": options.limit,
        "seed": options.seed,
        "environment": environment("cpu", str(torch.float32), 1),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "overview.json").write_text(json.dumps(made, indent=1) + "\n")
    for name, row in found.items():
        print(name, row)


if __name__ == "__main__":
    main()
