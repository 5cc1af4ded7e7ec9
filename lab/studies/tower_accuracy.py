"""Accuracy under reduction in the tower: ``python lab/studies/tower_accuracy.py``, results/tower_accuracy.json.

Every share of the patches in front of the same method at 11 %, paired with that method behind the whole tower; with and
without mass, and the floors; of clips, what moves, too. 56 % as the default was chosen on other questions (seed 500),
as was what else is in the table (508, 509). ``--context``: 2,000 of them with rows for what leaves, whose number was
chosen on others (531, tower_rows.json); results/tower_context.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import benchmark_path  # noqa: F401
import torch
from common import environment

from duet_vlm.evaluation.experiment import Experiment
from duet_vlm.evaluation.run import run_experiment
from duet_vlm.reducers.options import TokenOptions

BUDGET, WHOLE = 0.11, "whole tower"
TASKS = {"tiny": "tiny", "tiny-crowded": "tiny", "tiny-video": "tiny-video"}
SHARES = (0.56, 0.53, 0.5, 0.42, 0.4)
# patches, rows for the others
CONTEXT = {"contrast": ((0.51, 6), (0.46, 6), (0.4, 6), (0.36, 6)), "motion": ((0.45, 2), (0.34, 2))}
MOVING = (0.5, 0.44, 0.36)  # of clips, whose small frames' towers cost less attention and more of all else


def cells(method: str, task: str, context: bool) -> list[dict[str, Any]]:
    """``method`` behind the whole tower, and behind what other methods leave of it, with rows for what leaves or
    without."""

    def behind(tower: str, keep: float, **settings: Any) -> dict[str, Any]:
        label = f"{tower}, {keep:.0%}" + ", no mass" * ("proportional_attention" in settings)
        label += f", context of {settings['pooled_context_tokens']}" if "pooled_context_tokens" in settings else ""
        own = {f"{tower}_{key}": value for key, value in {"keep": keep, **settings}.items()}
        return {"method": f"{tower}+{method}", "budgets": [BUDGET], "settings": own, "label": label}

    whole = {"method": method, "budgets": [BUDGET], "label": WHOLE}
    if context:
        tower = "motion" if task == "tiny-video" else "contrast"
        return [whole, *(behind(tower, keep, context=rows) for keep, rows in CONTEXT[tower])]
    return [
        whole,
        *(behind("contrast", keep) for keep in SHARES),
        behind("contrast", 0.5, options=TokenOptions(proportional_attention=False)),
        *(behind("motion", keep) for keep in MOVING if task == "tiny-video"),
        *(behind(floor, 0.5) for floor in ("random_patches", "checkerboard")),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="questions of each task: 1000, or 2000 with --context")
    parser.add_argument("--seed", type=int, default=41, help="stream of questions; one that nothing was chosen on")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--context", action="store_true", help="with rows for what leaves, in front of duet_plus")
    args = parser.parse_args()
    name, limit = ("tower_context", args.limit or 2000) if args.context else ("tower_accuracy", args.limit or 1000)
    torch.set_num_threads(1)
    rows = []
    for task in args.tasks:
        for method in ("duet_plus",) if args.context else ("duet_plus", "duet"):
            job = Experiment(
                task, tuple(cells(method, task, args.context)), TASKS[task], (args.seed,), limit, against=WHOLE
            )
            with tempfile.TemporaryDirectory() as folder:
                result = run_experiment(job, "tower", Path(folder) / "journals", workers=1, timing_rounds=0)
            full = result["runs"][0]["accuracy"]
            for row in result["runs"][1:]:
                rows.append(
                    {"task": task, "method": method, "tower": row["label"], "accuracy": row["accuracy"], "full": full}
                )
                if row.get("against"):
                    rows[-1] |= {"difference": row["against"]["difference"], "interval": row["against"]["interval"]}
    out = {"benchmark": name, "questions": limit, "seed": args.seed, "environment": environment(), "results": rows}
    (Path(__file__).parent / "results" / f"{name}.json").write_text(json.dumps(out, indent=1) + "\n")
    for row in rows:
        print(row["task"], row["method"], row["tower"], row["accuracy"], row.get("difference"))


if __name__ == "__main__":
    main()
