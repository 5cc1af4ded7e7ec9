"""Accuracy of the embedded VLM by method and budget, every run on the same fresh test questions: writes results/accuracy.json."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

import duet_vlm
from duet_vlm import tiny
from duet_vlm.tiny.evaluate import table
from duet_vlm.tiny.questions import KINDS
from duet_vlm.tiny.selections import answer_tokens

RESULT = Path(__file__).parent / "results" / "accuracy.json"
METHODS = ("duet", "visionzip", "pyramiddrop", "fastv", "random", "uniform")
BUDGETS = (0.33, 0.22, 0.11)
TOKENS = 256
BATCH = 40


def questions(processor: Any, count: int, seed: int) -> Iterator[tuple[list[tiny.Sample], Any]]:
    """Batches of fresh test questions with the inputs made of them, drawn and processed once for all runs."""
    for first in range(0, count, BATCH):
        items = [tiny.sample("test", i, seed) for i in range(first, min(first + BATCH, count))]
        text = [tiny.prompt(item.question) for item in items]
        yield items, processor(images=[item.image for item in items], text=text, return_tensors="pt", padding=True)


def reduced(model: Any, processor: Any, method: str, budget: float, inputs: Any) -> tuple[list[str], float]:
    """Answers of ``generate`` with a method attached, and the mean visual tokens that the layers read."""
    with duet_vlm.attach(model, method, budget=budget) as handle, torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        tokens = handle.report().measured_mean
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True), tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    model, processor = tiny.load()
    runs = [("none", 1.0), *((method, budget) for budget in BUDGETS for method in (*METHODS, "oracle"))]
    rng = np.random.default_rng(options.seed)
    hits: dict[tuple[str, float], dict[str, list[bool]]] = {run: {kind: [] for kind in KINDS} for run in runs}
    measured: dict[tuple[str, float], float] = {}
    with Progress() as progress:
        bar = progress.add_task("asking", total=-(-options.questions // BATCH) * len(runs))
        for items, inputs in questions(processor, options.questions, options.seed):
            for method, budget in runs:
                if method == "oracle":  # told which patches the answer needs; a constant count at the decoder's door
                    keep = int(budget * TOKENS)
                    said = [processor.decode(t) for t in answer_tokens(model, dict(inputs.items()), items, "oracle", keep, rng)]
                    measured[method, budget] = keep
                else:
                    said, measured[method, budget] = reduced(model, processor, method, budget, inputs)
                for item, answer in zip(items, said, strict=True):
                    hits[method, budget][item.kind].append(answer.strip() == item.answer)
                progress.advance(bar)
    rows = []
    for (method, budget), found in hits.items():
        score = table(found)
        every = score.pop("all")
        row = {"method": method, "budget": budget, "measured_tokens": measured[method, budget], "accuracy": every["accuracy"]}
        rows.append(row | {"interval": [every["low"], every["high"]], "kinds": {kind: value["accuracy"] for kind, value in score.items()}})
    environment = {"version": duet_vlm.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    data = {"questions": options.questions, "seed": options.seed, "environment": environment, "runs": rows}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
