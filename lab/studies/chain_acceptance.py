"""Is a trained ``tiny-chain`` fit to compare methods on? ``python lab/studies/chain_acceptance.py
[out/tiny-chain/weights]``.

Asks fresh questions of the full model, of the model without any visual token from layer r on (for every r), of the
oracle, and of a random choice with DUET's counts; writes lab/comparison/tiny-chain/acceptance.json and says which
conditions hold. Goes on after a kill.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

from duet_vlm.evaluation.drop_curve import FULL, LABEL, drops
from duet_vlm.evaluation.experiment import Experiment
from duet_vlm.evaluation.run import run_experiment
from duet_vlm_lab.generators.chain_questions import KINDS
from duet_vlm_lab.networks.chain_network import LAYERS

HOME = Path(__file__).resolve().parents[1] / "comparison" / "tiny-chain"
BUDGET = 0.11
ORACLE, RANDOM, DUET = "oracle", "random with DUET's counts", "duet"


def experiment(model: str, limit: int, seed: int) -> Experiment:
    """The questions: ``limit`` of them, the kinds in turn."""
    others = [
        {"method": "duet", "budgets": [BUDGET], "label": DUET},
        {"method": "random", "budgets": [BUDGET], "settings": {"follow": "duet"}, "label": RANDOM},
        {"method": "oracle", "budgets": [BUDGET], "label": ORACLE},
    ]
    return Experiment("tiny-chain", (*drops(range(1, LAYERS)), *others), model, (seed,), limit, against=FULL)


def judge(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The conditions: what was found, what is wanted, whether it holds.

    ``runs`` maps the labels above to rows of a result (``accuracy`` and ``kinds``).
    """

    def loss(layer: int, kind: str) -> float:
        return runs[FULL]["kinds"][kind]["accuracy"] - runs[f"{LABEL}{layer}"]["kinds"][kind]["accuracy"]

    full, half, late = runs[FULL]["accuracy"], LAYERS // 2, math.ceil(LAYERS * 2 / 3)
    least = {
        "accuracy of the full model": (full, 0.85),
        "accuracy on three hops": (runs[FULL]["kinds"]["hop3"]["accuracy"], 0.75),
        f"lost on two hops without visual tokens from layer {half}": (loss(half, "hop2"), 0.10),
        f"lost on counting without visual tokens from layer {half}": (loss(half, "count"), 0.10),
        f"lost on three hops without visual tokens from layer {late}": (loss(late, "hop3"), 0.10),
        f"kept by the oracle at {BUDGET:.0%}": (runs[ORACLE]["accuracy"] / full if full else 0.0, 0.97),
        f"lost by a random choice at {BUDGET:.0%}": (full - runs[RANDOM]["accuracy"], 0.25),
    }
    return {
        name: {"found": round(found, 4), "at_least": wanted, "holds": found >= wanted}
        for name, (found, wanted) in least.items()
    }


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Conditions, accuracy by run and kind, and how many needed tokens each choice lets into the decoder."""
    runs = {row["label"]: row for row in result["runs"]}
    table = {
        label: {"all": row["accuracy"], **{kind: row["kinds"][kind]["accuracy"] for kind in KINDS}}
        for label, row in runs.items()
    }
    recall = {label: runs[label]["recall"]["entry"] for label in (DUET, RANDOM)}
    return {
        "conditions": judge(runs),
        "accuracy": {label: {kind: round(value, 4) for kind, value in row.items()} for label, row in table.items()},
        "needed tokens that enter the decoder": {label: round(value, 4) for label, value in recall.items()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model", nargs="?", default="tiny-chain", help="the embedded model, or the folder of one that you trained"
    )
    parser.add_argument("--limit", type=int, default=2000, help="questions")
    parser.add_argument("--seed", type=int, default=100, help="stream of questions; one that nothing was tuned on")
    parser.add_argument("--workers", type=int, default=2, help="processes that answer")
    parser.add_argument("--out", type=Path, default=HOME, help="folder for acceptance.json")
    options = parser.parse_args()
    asked, journals = experiment(options.model, options.limit, options.seed), options.out / "acceptance.parts"
    result = run_experiment(asked, "acceptance", journals, workers=options.workers, timing_rounds=0)
    found = summary(result) | {"questions": options.limit, "seed": options.seed, "environment": result["environment"]}
    (options.out / "acceptance.json").write_text(json.dumps(found, indent=1) + "\n")
    shutil.rmtree(journals)
    for name, condition in found["conditions"].items():
        print(
            f"{'holds' if condition['holds'] else 'FAILS'}  {name}: {condition['found']:.3f}, at least {condition['at_least']}"
        )


if __name__ == "__main__":
    main()
