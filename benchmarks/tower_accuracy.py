"""What reduction in the tower costs in answers: ``python benchmarks/tower_accuracy.py``, results/tower_accuracy.json.

Shares of the patches in front of the same method at 11 %, paired with that method behind the whole tower: by what ``contrast`` (pictures) and
``motion`` (clips) keep, by other methods, and by chance. Shares and rules were chosen on other questions (seeds 500 to 508).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import HERE, environment

import duet_vlm
from duet_vlm.evaluate.experiment import Experiment
from duet_vlm.evaluate.run import run_experiment
from duet_vlm.flow.inside import leaving
from duet_vlm.measure.flops import vision_flops
from duet_vlm.models.find import adapter_for
from duet_vlm.tiny import load
from duet_vlm.tiny.scenes import GRID

BUDGET, WHOLE = 0.11, "whole tower"
TASKS = {"tiny": "tiny", "tiny-crowded": "tiny", "tiny-video": "tiny-video"}
SHARES = (0.56, 0.5, 0.42)
PATCHES = GRID * GRID


def cells(task: str, method: str) -> list[dict[str, Any]]:
    """``method`` behind the whole tower, and behind what other methods leave of it."""

    def behind(tower: str, keep: float, label: str, **settings: Any) -> dict[str, Any]:
        own = {f"{tower}_{key}": value for key, value in {"keep": keep, **settings}.items()}
        return {"method": f"{tower}+{method}", "budgets": [BUDGET], "settings": own, "label": label}

    best = "motion" if task == "tiny-video" else "contrast"
    found = [{"method": method, "budgets": [BUDGET], "label": WHOLE}, *(behind(best, keep, f"{best}, {keep:.0%}") for keep in SHARES)]
    if method == "duet":
        return found
    if best == "motion":
        found.append(behind("contrast", 0.5, "contrast, 50%"))
    return [
        *found,
        behind("contrast", 0.5, "contrast, 50%, no mass", mass=False),
        behind("contrast", 0.5, "contrast, 50%, no ground", ground=0.0),
        behind("key_norm", 0.4, "key_norm, 40%"),
        behind("evit", 0.4, "evit, 40%"),
        behind("tome_tower", 0.3, "tome_tower, 30%"),
        behind("random_patches", 0.5, "random_patches, 50%"),
    ]


def flops_of(cell: dict[str, Any]) -> float:
    """What the tower of the tiny model needs behind such a method, of what it needs for the whole picture."""
    if "settings" not in cell:
        return 1.0
    adapter, name = adapter_for(load()[0]), cell["method"]
    reducer, shape = duet_vlm.get(name)(**cell["settings"]), adapter.vision_shape().read()
    left = int(PATCHES * cell["settings"][f"{name.split('+')[0]}_keep"])
    return vision_flops(shape, PATCHES, None, leaving(adapter, reducer, PATCHES, left)) / vision_flops(shape, PATCHES)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=700)
    parser.add_argument("--seed", type=int, default=41, help="stream of questions; one that nothing was chosen on")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--more", action="store_true", help="keep what the file holds of the other tasks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = HERE / "results" / "tower_accuracy.json"
    made: dict[str, Any] = json.loads(path.read_text()) if args.more else {"results": []}
    rows = [row for row in made["results"] if row["task"] not in args.tasks]
    for task in args.tasks:
        for method in ("duet_plus", "duet"):
            job = Experiment(task, tuple(cells(task, method)), TASKS[task], (args.seed,), args.limit, against=WHOLE)
            with tempfile.TemporaryDirectory() as folder:
                result = run_experiment(job, "tower", Path(folder) / "journal.jsonl", workers=1, timing_rounds=0)
            full = result["runs"][0]["accuracy"]
            for cell, row in zip(cells(task, method), result["runs"][1:], strict=True):
                rows.append({"task": task, "method": method, "tower": row["label"], "flops": flops_of(cell)})
                rows[-1] |= {"accuracy": row["accuracy"], "full": full}
                if row.get("against"):
                    rows[-1] |= {"difference": row["against"]["difference"], "interval": row["against"]["interval"]}
    out = {"benchmark": "tower_accuracy", "questions": args.limit, "seed": args.seed, "environment": environment(), "results": rows}
    path.write_text(json.dumps(out, indent=1) + "\n")
    for row in rows:
        print(row["task"], row["method"], row["tower"], row["accuracy"], row.get("difference"))


if __name__ == "__main__":
    main()
