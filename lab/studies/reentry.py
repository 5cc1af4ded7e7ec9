"""Do tokens that come back answer more than tokens that are dropped, at equal mean tokens, on questions that nobody has
looked at? ``python lab/studies/reentry.py [--tasks tiny-chain,tiny-page]``.

The stream of questions is sealed: its seed is made of the hash of the commit that is judged, which nobody can choose, and
lab/comparison/streams.json lists it from the moment at which it is opened. Results land in lab/comparison/TASK; goes on
after a kill, with the stream that is listed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from duet_vlm.api.loading import config_of
from duet_vlm.ops.schedules import awake_schedule
from duet_vlm_lab.streams import opened

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "lab" / "comparison"
NAME = "reentry"
QUESTIONS = {"tiny-chain": 1000, "tiny-crowded": 1000, "tiny-video": 1000, "tiny-page": 500}
MODELS = {"tiny-crowded": "tiny"}  # of other tasks: one of the same name
BUDGETS = (0.11, 0.07, 0.05)


def cells(depth: int) -> list[dict[str, Any]]:
    """The usual drops, re-entry, re-entry's counts with drops as control, and the published method that comes nearest."""
    control = [
        {
            "method": "duet_plus",
            "settings": {"schedule": [list(stage) for stage in awake_schedule(depth, budget)]},
            "label": "duet_plus, the same counts, dropped",
            "budgets": [budget],
        }
        for budget in BUDGETS
    ]
    woken = {"options": {"reentry": "layer"}}
    return [
        {"method": "duet_plus", "label": "duet_plus", "budgets": list(BUDGETS)},
        {"method": "duet_plus", "settings": woken, "label": "duet_plus, re-entry", "budgets": list(BUDGETS)},
        *control,
        {"method": "alvts", "label": "alvts", "budgets": list(BUDGETS)},
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(QUESTIONS))
    parser.add_argument("--workers", default="2", help="processes that answer")
    args = parser.parse_args()
    for task in args.tasks.split(","):
        model = MODELS.get(task, task)
        experiment = {
            "task": task,
            "model": model,
            "cells": cells(config_of(model).get_text_config().num_hidden_layers),
            "seeds": [opened(HOME / "streams.json", f"{task}/results/{NAME}.json")],
            "limit": QUESTIONS[task],
            "against": "duet_plus",
        }
        file = HOME / task / "experiments" / f"{NAME}.json"
        file.write_text(json.dumps(experiment, indent=1) + "\n")
        command = [Path(sys.executable).parent / "duet-vlm", "eval", "--experiment", file, "--timing-rounds", "0"]
        subprocess.run([*map(str, command), "--out", str(HOME), "--workers", args.workers], check=True)


if __name__ == "__main__":
    main()
