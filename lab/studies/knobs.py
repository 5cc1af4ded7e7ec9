"""Knobs of other methods, turned as ours were: several values on validation questions, the best one asked fresh
questions beside the default.

``python lab/studies/knobs.py [--limit 240]``: single thread, under an hour. A setting is chosen by its mean accuracy
over both tasks and all ``BUDGETS``; the default stays where no other is better. Methods that are not named here have no
knob that acts on a whole picture at a budget (their schedules are compared in lab/comparison/), or share it with one
that is. The result file has every value that was tried.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark_path  # noqa: F401
import torch
from common import environment

from duet_vlm.evaluation.experiment import Experiment
from duet_vlm.evaluation.run import run_experiment

FILE = Path(__file__).parent / "results" / "knobs.json"
BUDGETS = (0.22, 0.11, 0.05)
TASKS = {"tiny-chain": "tiny-chain", "tiny-crowded": "tiny"}
TRIED, FRESH = (1009,), (0, 1, 2)  # streams of questions; the fresh ones are those of comparison/
DEFAULT = "default"

Settings = dict[str, Any]

KNOBS: dict[str, tuple[Settings, ...]] = {
    "scope": ({"alpha": 0.5}, {"alpha": 2.0}, {"combined": "add"}),
    "vispruner": ({"important": 0.25}, {"important": 0.75}),
    "holov": ({"beta": 0.03}, {"beta": 0.3}, {"num_crops": 4}, {"num_crops": 64}),
    "prumerge": ({"neighbours": 4}, {"neighbours": 12}),
    "prumerge_plus": ({"important": 0.25}, {"important": 0.75}, {"neighbours": 4}),
    "vscan": (
        {"window": 4},
        {"window": 8},
        {"shallow": 0.5},
        {"merge_others": False},
        {"options": {"text_query": "all"}},
    ),
    "apet": ({"basis": 4}, {"basis": 20}),
    "sparsevlm": (
        {"recycle": False},
        {"best_heads": 2},
        {"options": {"text_query": "last"}},
        {"options": {"text_query": "all"}},
    ),
    "sieve": ({"heads": 2}, {"energy": 0.5}, {"energy": 0.9}),
    "pio": ({"tau": 0.6}, {"tau": 0.9}),
    "dart": ({"visual_pivots": 2}, {"visual_pivots": 8}, {"text_pivots": 0}),
    "d2pruner": ({"important": 0.5}, {"important": 0.9}, {"alike": 0.6}, {"options": {"text_query": "all"}}),
    "tokencarve": ({"attention_weight": 0.25}, {"attention_weight": 0.75}, {"options": {"text_query": "all"}}),
    "fastv": ({"options": {"text_query": "all"}},),
    "pyramiddrop": ({"options": {"text_query": "all"}},),
    "zoo_prune": ({"directions": 16}, {"step": 0.1}),
}


def named(settings: Settings) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or DEFAULT


def asked(cells: dict[str, list[Settings]], task: str, seeds: tuple[int, ...], limit: int) -> Iterator[dict[str, Any]]:
    """A row per method, setting and budget; ``duet_plus`` first, whom the others are tested against."""
    own = [
        {"method": method, "budgets": list(BUDGETS), "label": f"{method}, {named(settings)}"} | ({"settings": settings} if settings else {})
        for method, tried in {"duet_plus": [{}], **cells}.items() for settings in tried
    ]  # fmt: skip
    job = Experiment(task, tuple(own), TASKS[task], seeds, limit, against=own[0]["label"])
    with tempfile.TemporaryDirectory() as folder:
        result = run_experiment(job, "knobs", Path(folder) / "journals", workers=1, timing_rounds=0)
    full = result["runs"][0]["accuracy"]
    for row in result["runs"][1:]:
        method, setting = row["label"].split(", ", 1)
        said = {"task": task, "method": method, "setting": setting, "budget": row["beside"], "status": row["status"]}
        if row["status"] == "ok":
            said |= {"accuracy": row["accuracy"], "full": full}
            said |= {key: row["against"][key] for key in ("difference", "interval")} if row.get("against") else {}
        yield said


def best(rows: list[dict[str, Any]], method: str) -> Settings:
    """The setting of the largest mean accuracy; the default's wins ties, and a value that cannot be run somewhere is
    out."""
    tried: list[Settings] = [{}, *KNOBS[method]]

    def mean(settings: Settings) -> float:
        own = [row for row in rows if (row["method"], row["setting"]) == (method, named(settings))]
        found = [row["accuracy"] for row in own if row["status"] == "ok"]
        return sum(found) / len(found) if len(found) == len(budgets_run(rows, method)) else -1.0

    return max(tried, key=mean)


def budgets_run(rows: list[dict[str, Any]], method: str) -> set[tuple[str, float]]:
    """(task, budget) that the default could be run at."""
    return {
        (row["task"], row["budget"])
        for row in rows
        if (row["method"], row["setting"], row["status"]) == (method, DEFAULT, "ok")
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=240, help="validation questions of each task")
    parser.add_argument("--fresh", type=int, default=160, help="fresh questions of each task and stream")
    args, here = parser.parse_args(), environment()
    torch.set_num_threads(1)
    everything = {method: [{}, *tried] for method, tried in KNOBS.items()}
    tried = [row for task in TASKS for row in asked(everything, task, TRIED, args.limit)]
    chosen = {method: best(tried, method) for method in KNOBS}
    turned = {method: [{}, settings] for method, settings in chosen.items() if settings}
    fresh = [row for task in TASKS for row in asked(turned, task, FRESH, args.fresh)]
    out = {
        "benchmark": "knobs",
        "questions": args.limit,
        "seeds": TRIED,
        "fresh_questions": args.fresh * len(FRESH),
        "fresh_seeds": FRESH,
    }
    out |= {
        "chosen": {method: named(settings) for method, settings in chosen.items()},
        "environment": here,
        "tried": tried,
        "results": fresh,
    }
    FILE.write_text(json.dumps(out, indent=1) + "\n")
    for row in fresh:
        print(row["task"], row["method"], row["setting"], row["budget"], row.get("accuracy"), row.get("difference"))


if __name__ == "__main__":
    main()
