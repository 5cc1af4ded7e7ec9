"""Does a schedule that was read off the drop curve hold on fresh questions? ``python lab/studies/drop_curve.py [--tasks
tiny-crowded,tiny-video]``.

For each task: the curve and the contest of schedules on questions of one seed (``duet-vlm drop-curve``), then what won,
budget by budget, beside both fixed schedules on questions of another. Results land in lab/comparison/TASK; goes on
after a kill.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "lab" / "comparison"
CHOSEN_ON, FRESH = 900, 901  # seeds that nothing else asks
QUESTIONS, FRESH_QUESTIONS = 240, 300
BUDGETS = (0.11, 0.07, 0.05)


def verb(*words: object) -> str:
    """Run a ``duet-vlm`` command; return its output."""
    return subprocess.run(
        [Path(sys.executable).parent / "duet-vlm", *map(str, words)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def fresh(task: str, found: dict) -> dict:
    """The experiment that judges: the winner at each budget beside the fixed schedules of the contest."""
    contest = found["contest"]
    fixed = [
        {**cell, "budgets": list(BUDGETS)}
        for cell in contest["experiment"]["cells"]
        if cell["label"] in ("paper", "deep")
    ]
    cells = [  # "tau" is at its default: it gives the row a name of its own where a fixed schedule has won
        {
            "method": best["method"],
            "budgets": [best["budget"]],
            "settings": {"schedule": best["schedule"], "tau": 0.6},
            "label": "proposed",
        }
        for best in found["best"].values()
    ]
    model = contest["experiment"]["model"]
    return {
        "task": task,
        "model": model,
        "cells": [*cells, *fixed],
        "seeds": [FRESH],
        "limit": FRESH_QUESTIONS,
        "against": "proposed",
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="tiny-crowded,tiny-video")
    parser.add_argument("--workers", default="2", help="processes that answer")
    args = parser.parse_args()
    for task in args.tasks.split(","):
        where = ["--out", HOME, "--workers", args.workers]
        budgets = ",".join(map(str, BUDGETS))
        print(task, flush=True)
        asked = ["--task", task, "--seed", CHOSEN_ON, "--limit", QUESTIONS, "-b", budgets, "--name", "drop-curve"]
        found = json.loads(verb("drop-curve", *asked, "--json", *where))
        file = HOME / task / "experiments" / "drop-curve-fresh.json"
        file.write_text(json.dumps(fresh(task, found), indent=1) + "\n")
        print(verb("eval", "--experiment", file, "--timing-rounds", "0", *where), flush=True)
        shutil.copy(found["picture"], ROOT / "docs" / "images" / f"drop-{task}.png")


if __name__ == "__main__":
    main()
