"""Accuracy of models trained with and without reduction from one start: train every config for every seed, then ask
them all the same.

``python lab/studies/training_accuracy.py [--configs full,duet-11] [--seeds 0,1,2] [--evaluate]``: trained models land
in out/training, answers in lab/comparison/training/TASK/results. What is finished is skipped, so several processes can
share the work.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME, OUT = ROOT / "lab" / "comparison" / "training", ROOT / "out" / "training"
CONFIGS = ("full", "duet-11", "duet-07", "duet-33", "mixed", "annealed", "duet-05", "duet-11-longer", "duet_plus-11", "duet_plus-mixed",
           "tower-50", "tower-40")  # fmt: skip
PLUS = "0.11,0.07,0.05"
# the others: all of them
BUDGETS = {
    "duet-33": "0.33,0.11",
    "annealed": "0.33,0.11,0.07",
    "duet_plus-11": PLUS,
    "duet_plus-mixed": "0.33," + PLUS,
}
IN_TOWER = "duet_plus,contrast+duet_plus[contrast_keep=0.5],contrast+duet_plus[contrast_keep=0.4]"
ASKED_IN_TOWER = ("full", "duet_plus-11", "tower-50", "tower-40")
EVERY = "0.33,0.22,0.11,0.07,0.05"
TASKS = {"tiny": 334, "tiny-crowded": 334}  # questions per stream; three streams each: 2,004 in all


def train(config: str, seed: int) -> None:
    """One training run in this process."""
    from duet_vlm.train.run import train as run
    from duet_vlm.train.settings import settings_from

    out = OUT / f"{config}-{seed}"
    run(settings_from(config=HOME / "configs" / f"{config}.yaml", options={"out": str(out), "trainer": {"seed": seed}}))


def evaluate(config: str, seed: int, workers: str) -> None:
    """The trained model's answers, in full and at the budgets; the model trained in full also answers with duet_plus,
    and some behind less tower."""
    own = "duet_plus" if config.startswith("duet_plus") else "duet"
    jobs = [] if config.startswith("tower") else [(f"{config}-{seed}", own, BUDGETS.get(config, EVERY))]
    if config == "full":
        jobs.append((f"full-plus-{seed}", "duet_plus", PLUS))
    if config in ASKED_IN_TOWER:
        jobs.append((f"{config}-in-tower-{seed}", IN_TOWER, "0.11"))
    for task, limit in TASKS.items():
        for name, method, budgets in jobs:
            command = [
                str(Path(sys.executable).parent / "duet-vlm"),
                "eval",
                "--model",
                f"out/training/{config}-{seed}",
                "--methods",
                method,
            ]
            command += [
                "--budgets",
                budgets,
                "--tasks",
                task,
                "--seeds",
                "0,1,2",
                "--limit",
                str(limit),
                "--timing-rounds",
                "0",
            ]
            command += ["--workers", workers, "--against", method.split(",")[0], "--name", name, "--out", str(HOME)]
            subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--evaluate", action="store_true", help="after training, ask")
    parser.add_argument("--workers", default="2", help="processes that answer")
    args = parser.parse_args()
    os.chdir(ROOT)  # the configs name the start by its place in the repository
    for seed in map(int, args.seeds.split(",")):
        for config in args.configs.split(","):
            train(config, seed)
            if args.evaluate:
                evaluate(config, seed, args.workers)


if __name__ == "__main__":
    main()
