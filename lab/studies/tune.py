"""How often the choice of ``duet-vlm tune`` holds: many searches on 200 questions each, every choice asked 2,000 fresh
ones.

``nice -n 19 python lab/studies/tune.py`` writes ``results/tune-tiny-chain-98.json`` (``--task`` and ``--keep`` make
others); the same command goes on after a kill. Every search has questions of its own (a stream per repetition); the
fresh questions are one more stream, that no search has seen. The times by which candidates are called cheap are
measured once, in the first search.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from duet_vlm.api.loading import load
from duet_vlm.evaluation.journal import Journal
from duet_vlm.evaluation.results import environment
from duet_vlm.evaluation.run import model_facts
from duet_vlm.evaluation.source import source
from duet_vlm.evaluation.tasks import accepted, task, usual_model
from duet_vlm.evaluation.tune import BUDGETS, METHODS
from duet_vlm.evaluation.tune.answers import AnswerSource
from duet_vlm.evaluation.tune.candidates import candidates
from duet_vlm.evaluation.tune.search import Goal, search

FRESH_SEED = 1000
BATCH = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="tiny-chain")
    parser.add_argument("--keep", type=float, default=0.98)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--fresh", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="results/tune-TASK-PERCENT.json beside this file")
    parser.add_argument("--journals", type=Path, default=Path("out/tune-benchmark"))
    asked = parser.parse_args()
    out = asked.out or Path(__file__).parent / f"results/tune-{asked.task}-{round(100 * asked.keep)}.json"
    torch.set_num_threads(1)
    code, loaded, questions = source(), load(usual_model(asked.task), "cpu"), task(asked.task)
    runs = candidates([(method, {}) for method in METHODS], BUDGETS, ("own",), loaded.model)

    def asker(name: str, seed: int) -> AnswerSource:
        subject = {"task": asked.task, "keep": asked.keep, "seed": seed, "batch": BATCH, "source code": code.files}
        return AnswerSource(
            loaded,
            questions,
            seed,
            BATCH,
            Journal(asked.journals / f"{asked.task}-{asked.keep:g}-{name}.jsonl", subject),
        )

    fresh = asker("fresh", FRESH_SEED)
    said = fresh.full(asked.fresh)
    usable = [number for number, text in said.items() if accepted(text, fresh.accepted(number))]
    rows: list[dict[str, Any]] = []
    times = None
    for repetition in range(asked.repetitions):
        one = asker(str(repetition), repetition)
        if times is not None and "times" not in one.journal.batches:
            one.journal.add("times", times)
        try:
            found = search(one, asked.questions, runs, Goal(keep=asked.keep), rounds=7)
        except ValueError as error:  # too few questions that the full model answers right
            rows.append({"repetition": repetition, "chosen": None, "why": str(error)})
            continue
        assert found is not None
        times = times or one.journal.batches["times"]
        row: dict[str, Any] = {"repetition": repetition, "chosen": found["chosen"]}
        if found["chosen"] is not None:
            (run,) = [run for run in runs if run.id == found["chosen"]]
            candidate = next(c for c in found["candidates"] if c["id"] == run.id)
            replies = fresh.replies([run], usable, said)[run.id]
            assert isinstance(replies, list)
            lost = sum(reply.lost for reply in replies)
            row |= {key: candidate[key] for key in ("bound", "ms", "speedup", "testing")}
            row["fresh"] = {"asked": len(usable), "lost": lost, "kept": 1 - lost / len(usable)}
            row["holds"] = row["fresh"]["kept"] >= asked.keep
        rows.append(row)
        print(json.dumps(row), flush=True)
    chosen = [row for row in rows if row["chosen"] is not None]
    result = {
        "task": asked.task, "model": model_facts(loaded), "keep": asked.keep, "questions": asked.questions, "fresh": asked.fresh,
        "fresh_right": len(usable), "candidates": [run.id for run in runs], "repetitions": rows,
        "chosen": len(chosen), "hold": sum(row["holds"] for row in chosen), "environment": environment("cpu", "float32", 1, code.until(source())),
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{len(rows)} searches: {len(chosen)} chose, {result['hold']} of these hold on {len(usable)} fresh questions; written: {out}"
    )


if __name__ == "__main__":
    main()
