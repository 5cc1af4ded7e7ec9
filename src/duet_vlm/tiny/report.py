"""State how good the shipped model is: ``python -m duet_vlm.tiny.report`` rewrites ``weights/accuracy.json``.

The full model on 2,000 test questions, and reference rows (random, uniform, CLS attention, oracle at the LLM input, and this
library's own method) on the first ``ROW_QUESTIONS`` of them. The rows tell whether the benchmark can tell methods apart.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from . import Sample, load, path
from .evaluate import evaluate, generated_answers, selected_answers
from .network import VISUAL_TOKENS
from .selections import SELECTIONS

KEPT = (85, 57, 28)  # 33, 22 and 11 %: the fractions of 192, 128 and 64 among LLaVA's 576
ROW_QUESTIONS = 350


def selection_rows(model, processor, questions: int, seed: int) -> dict[str, dict[str, float]]:
    """Accuracy per kind for every reference selection and number of kept tokens."""
    rows = {}
    for keep in KEPT:
        for how in SELECTIONS:

            def answer(items: list[Sample], how: str = how, keep: int = keep) -> list[str]:
                return selected_answers(model, processor, items, how, keep, seed)

            rows[f"{how} {keep}"] = _accuracies(evaluate(answer, questions, seed))
    return rows


def method_rows(model, processor, questions: int, seed: int) -> dict[str, dict[str, float]]:
    """Accuracy per kind with this library's default method at the same mean budgets."""
    from duet_vlm import attach

    rows = {}
    for keep in KEPT:
        with attach(model, "duet", budget=keep / VISUAL_TOKENS):
            result = evaluate(lambda items: generated_answers(model, processor, items), questions, seed)
        rows[f"duet {keep}"] = _accuracies(result)
    return rows


def _accuracies(result: dict[str, dict[str, float]]) -> dict[str, float]:
    return {kind: round(float(np.round(row["accuracy"], 3)), 3) for kind, row in result.items()}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m duet_vlm.tiny.report", description=__doc__)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--row-questions", type=int, default=ROW_QUESTIONS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=path() / "accuracy.json")
    args = parser.parse_args(argv)
    model, processor = load()
    full = evaluate(lambda items: generated_answers(model, processor, items), args.questions, args.seed, show=True)
    stated = {"settings": {"split": "test", "seed": args.seed, "questions": args.questions}, "kinds": full}
    args.out.write_text(json.dumps(stated, indent=1) + "\n")  # the main table is there even if the rows are interrupted
    rows = selection_rows(model, processor, args.row_questions, args.seed) | method_rows(model, processor, args.row_questions, args.seed)
    stated["rows"] = {"questions": args.row_questions, "accuracy": rows}
    args.out.write_text(json.dumps(stated, indent=1).replace("\n    ", " ").replace("\n   }", "}") + "\n")
    for name, row in {"all 256": _accuracies(full), **rows}.items():
        print(f"{name:12}", " ".join(f"{kind} {value:.3f}" for kind, value in row.items()))


if __name__ == "__main__":
    main()
