"""Accuracy of the embedded VLM by method and budget, every run on the same fresh test questions: writes results/accuracy.json."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console

import duet_vlm
from duet_vlm import tiny
from duet_vlm.tiny.evaluate import evaluate, generated_answers, selected_answers

RESULT = Path(__file__).parent / "results" / "accuracy.json"
METHODS = ("duet", "visionzip", "pyramiddrop", "fastv", "random", "uniform")
BUDGETS = (0.33, 0.22, 0.11)
TOKENS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    console = Console()
    model, processor = tiny.load()
    runs = []

    def add(method: str, budget: float, tokens: float, score: dict[str, dict[str, float]]) -> None:
        every = score.pop("all")
        kinds = {kind: row["accuracy"] for kind, row in score.items()}
        run = {"method": method, "budget": budget, "measured_tokens": tokens, "accuracy": every["accuracy"]}
        runs.append(run | {"interval": [every["low"], every["high"]], "kinds": kinds})
        console.print(f"{method} {budget:.0%}: {every['accuracy']:.3f}")

    for method, budget in [("none", 1.0), *((method, budget) for budget in BUDGETS for method in METHODS)]:
        with duet_vlm.attach(model, method, budget=budget) as handle:
            score = evaluate(lambda items: generated_answers(model, processor, items), options.questions, options.seed)
            add(method, budget, handle.report().measured_mean, score)
    for budget in BUDGETS:
        keep = int(budget * TOKENS)
        score = evaluate(lambda items, k=keep: selected_answers(model, processor, items, "oracle", k, 0), options.questions, options.seed)
        add("oracle", budget, keep, score)
    environment = {"version": duet_vlm.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    data = {"questions": options.questions, "seed": options.seed, "environment": environment, "runs": runs}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
