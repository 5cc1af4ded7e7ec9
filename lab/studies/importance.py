"""Rankings of tokens before the decoder: ``python lab/studies/importance.py``, results/importance.json.

Two questions about the embedded models, whose tower has a CLS row that learned from labels of what a picture shows.
What is that row worth? And do answers suffer when few rows of a tower without one rank its tokens? For both the tower
is read as if it had none: importance is the attention that a patch receives from the other patches, from all 256 of
them, or from 64, 32 or 13 that are spread over the picture (13 of 256 is what 256 are of a page of 5,184). Answers are
paired with those where all rows ask.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import benchmark_path  # noqa: F401
import torch
from common import environment
from torch import Tensor

from duet_vlm.evaluation.experiment import Experiment
from duet_vlm.evaluation.run import run_experiment
from duet_vlm.models.adapter import RecordedQK
from duet_vlm.models.llava import Llava
from duet_vlm.ops.score import column_attention

BUDGETS, QUERIES, CLS = (0.11, 0.05), (64, 32, 13), 1  # one row asks: the CLS row
TASKS = {"tiny": "tiny", "tiny-crowded": "tiny"}
by_cls = Llava.signals


def received(self: Llava, recorded: RecordedQK) -> tuple[Tensor, Tensor]:
    """In place of ``Llava.signals``: attention that patches receive from patches."""
    if recorded.sample == CLS:
        return by_cls(self, recorded)
    query, key = recorded.query[:, :, 1:], recorded.key[:, :, 1:]
    return column_attention(query, key, recorded.scaling, recorded.sample), key.float().mean(1)


def cells(method: str) -> list[dict[str, Any]]:
    """``method`` with all rows asking, with fewer, with the CLS row alone."""
    return [
        {
            "method": method,
            "budgets": list(BUDGETS),
            "settings": {"options": {"signal_queries": queries}},
            "label": f"{method}, {who}",
        }
        for queries, who in ((None, "all rows"), *((n, f"{n} rows") for n in QUERIES), (CLS, "CLS row"))
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=700)
    parser.add_argument("--seed", type=int, default=30, help="stream of questions")
    args = parser.parse_args()
    torch.set_num_threads(1)
    Llava.signals = received  # type: ignore[method-assign]
    rows = []
    for task, model in TASKS.items():
        for method in ("duet", "duet_plus"):
            job = Experiment(task, tuple(cells(method)), model, (args.seed,), args.limit, against=f"{method}, all rows")
            with tempfile.TemporaryDirectory() as folder:
                found = run_experiment(job, "importance", Path(folder) / "journals", device="cpu", timing_rounds=0)
            facts = ("label", "budget", "accuracy", "interval", "kept", "against")
            rows += [{"task": task} | {key: row[key] for key in facts} for row in found["runs"][1:]]
    out = {
        "benchmark": "importance",
        "environment": environment(),
        "questions": args.limit,
        "seed": args.seed,
        "results": rows,
    }
    (Path(__file__).parent / "results" / "importance.json").write_text(json.dumps(out, indent=1) + "\n")
    for row in rows:
        more = row["against"]
        told = (
            ""
            if more is None
            else f"  {100 * more['difference']:+.1f} ({100 * more['interval'][0]:+.1f} to {100 * more['interval'][1]:+.1f})"
        )
        print(f"{row['task']:<14} {row['label']:<22} {row['budget']:.0%}  {row['accuracy']:.3f}{told}")


if __name__ == "__main__":
    main()
