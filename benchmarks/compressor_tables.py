"""The table of docs/trained-compressors.md, from the rows that have been made so far."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).parent / "results"


def accuracy() -> str:
    rows = json.loads((RESULTS / "compressors.json").read_text())["rows"]
    found: dict[tuple[int, str, int], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (-row["tokens_asked"], row["conversations"], -sum(row["accuracy"].values()))):
        found.setdefault((row["tokens_asked"], row["method"], row["conversations"]), []).append(row)
    tasks = list(rows[0]["accuracy"])
    head = ["tokens", "method", "conversations", "models", *(f"`{task}`" for task in tasks), "CPU seconds of training", "GFLOPs of a question"]
    lines = [head, ["---"] * len(head)]
    for (tokens, method, conversations), made in found.items():
        cells = [f"{mean(row['accuracy'][task] for row in made):.3f}" for task in tasks]
        timed = [row["train_cpu_seconds"] for row in made if row["train_cpu_seconds"] is not None]  # trained in one go
        cells += [f"{mean(timed):.0f}" if timed else "-", f"{mean(row['gflops'] for row in made):.2f}"]
        lines.append([str(tokens), f"`{method}`", f"{conversations:,}", str(len(made)), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


BLOCKS: dict[str, Callable[[], str]] = {"compressors": accuracy}
