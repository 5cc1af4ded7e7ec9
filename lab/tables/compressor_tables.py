"""The table of docs/trained-compressors.md, from the rows that have been made so far."""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import mean
from typing import Any

from folders import STUDIES


def accuracy() -> str:
    rows = json.loads((STUDIES / "compressors.json").read_text())["rows"]
    found: dict[tuple[int, str, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["tokens_asked"], row["method"], row["conversations"], row.get("imitate", 0)), []).append(
            row
        )
    order = sorted(found, key=lambda key: (-key[0], key[2], -mean(sum(row["accuracy"].values()) for row in found[key])))
    tasks = list(rows[0]["accuracy"])
    said = ["tokens", "method", "imitates", "conversations", "models"]
    head = [*said, *(f"`{task}`" for task in tasks), "CPU seconds of training", "GFLOPs of a question"]
    lines = [head, ["---"] * len(head)]
    for tokens, method, conversations, imitate in order:
        made = found[tokens, method, conversations, imitate]
        cells = [f"{mean(row['accuracy'][task] for row in made):.3f}" for task in tasks]
        timed = [row["train_cpu_seconds"] for row in made if row["train_cpu_seconds"] is not None]  # trained in one go
        cells += [f"{mean(timed):.0f}" if timed else "-", f"{mean(row['gflops'] for row in made):.2f}"]
        lines.append(
            [
                str(tokens),
                f"`{method}`",
                f"{imitate} steps" if imitate else "",
                f"{conversations:,}",
                str(len(made)),
                *cells,
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sizes() -> str:
    rows = json.loads((STUDIES / "decoder_sizes.json").read_text())["rows"]
    head = [
        "GFLOPs of a question",
        "decoder layers",
        "rows",
        *(f"`{task}`" for task in rows[0]["accuracy"]),
        "CPU seconds of training",
    ]
    lines = [head, ["---:"] * len(head)]
    for row in rows:
        cells = [f"{row['gflops']:.2f}", str(row["layers"]), str(row["tokens_asked"] or "all")]
        lines.append(
            [*cells, *(f"{right:.3f}" for right in row["accuracy"].values()), f"{row['train_cpu_seconds']:.0f}"]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


BLOCKS: dict[str, Callable[[], str]] = {"compressors": accuracy, "decoder_sizes": sizes}
