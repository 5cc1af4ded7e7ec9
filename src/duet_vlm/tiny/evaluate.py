"""Held-out accuracy: ``python -m duet_vlm.tiny.evaluate --questions 2000 [--method duet --budget 0.11] [--json FILE]``.

Fresh questions of a stream, the real processor and the model's own ``generate``; exact match of the one-word answer.
``--select oracle --keep 28`` prints a reference row instead (see ``selections.py``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from . import Sample, load, prompt, sample
from .questions import CHANCE, KINDS
from .selections import SELECTIONS, answer_tokens

Z95 = 1.959964


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = hits / n, Z95 * Z95
    middle, half = p + z2 / (2 * n), Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)


def table(found: dict[str, list[bool]]) -> dict[str, dict[str, float]]:
    """Accuracy, interval, number of questions and chance level per kind and over all questions."""
    rows = {**found, "all": [h for hits in found.values() for h in hits]}
    out = {}
    for kind, hits in rows.items():
        low, high = wilson(sum(hits), len(hits))
        chance = CHANCE[kind] if kind in CHANCE else sum(CHANCE[k] * len(v) for k, v in found.items()) / max(1, len(hits))
        values = {"accuracy": sum(hits) / max(1, len(hits)), "low": low, "high": high, "chance": chance}
        out[kind] = {"n": len(hits), **{k: round(v, 4) for k, v in values.items()}}
    return out


def _batches(questions: int, size: int, split: str, seed: int) -> Iterator[list[Sample]]:
    for first in range(0, questions, size):
        yield [sample(split, i, seed) for i in range(first, min(first + size, questions))]


def generated_answers(model, processor, items: list[Sample]) -> list[str]:
    """Answers of the model's ``generate`` for a batch."""
    inputs = processor(images=[i.image for i in items], text=[prompt(i.question) for i in items], return_tensors="pt", padding=True)
    inputs = inputs.to(model.device, model.dtype)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return [t.strip() for t in processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]


def selected_answers(model, processor, items: list[Sample], how: str, keep: int, seed: int) -> list[str]:
    """Answers when a reference selection of ``keep`` visual tokens reaches the LLM."""
    inputs = processor(images=[i.image for i in items], text=[prompt(i.question) for i in items], return_tensors="pt", padding=True)
    tokens = answer_tokens(model, dict(inputs.items()), items, how, keep, np.random.default_rng(seed))
    return [processor.decode(t).strip() for t in tokens]


def evaluate(
    answer: Callable[[list[Sample]], list[str]], questions: int, seed: int = 0, batch: int = 32, split: str = "test", show: bool = False
) -> dict[str, dict[str, float]]:
    """Ask ``questions`` questions of a stream; see :func:`table` for what comes back.

    Parameters
    ----------
    answer : callable
        Samples -> answers.
    show : bool
        Draw a progress bar.
    """
    if questions < 1 or batch < 1:
        raise ValueError(f"questions and batch must be 1 or more, got {questions} and {batch}")
    found: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    bar = _progress(math.ceil(questions / batch)) if show else contextlib.nullcontext(lambda: None)
    with bar as advance:
        for items in _batches(questions, batch, split, seed):
            for item, said in zip(items, answer(items), strict=True):
                found[item.kind].append(said == item.answer)
            advance()
    return table(found)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    from rich.progress import Progress

    with Progress() as progress:
        task = progress.add_task("asking", total=total)
        yield lambda: progress.advance(task)


def _print(result: dict[str, dict[str, float]]) -> None:
    print(f"{'kind':12}{'n':>6}{'accuracy':>10}  {'95 % interval':16}{'chance':>7}")
    for kind, row in result.items():
        print(f"{kind:12}{row['n']:>6}{row['accuracy']:>10.3f}  {row['low']:.3f} - {row['high']:.3f}   {row['chance']:>7.3f}")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m duet_vlm.tiny.evaluate", description=__doc__)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"])
    parser.add_argument("--method", help="a method of this library, attached while answering")
    parser.add_argument("--budget", type=float, default=0.11, help="share of visual tokens for --method")
    parser.add_argument("--select", choices=SELECTIONS, help="a reference selection at the LLM input")
    parser.add_argument("--keep", type=int, default=28, help="visual tokens for --select")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args(argv)
    if args.method and args.select:
        parser.error("use --method or --select, not both")
    model, processor = load()
    with contextlib.ExitStack() as stack:
        if args.method:
            from duet_vlm import attach

            stack.enter_context(attach(model, args.method, budget=args.budget))
        if args.select:
            def answer(items: list[Sample]) -> list[str]:
                return selected_answers(model, processor, items, args.select, args.keep, args.seed + items[0].needed.size)
        else:
            def answer(items: list[Sample]) -> list[str]:
                return generated_answers(model, processor, items)

        result = evaluate(answer, args.questions, args.seed, args.batch, args.split, show=True)
    _print(result)
    if args.json:
        how = {k: getattr(args, k) for k in ("split", "seed", "questions", "batch")}
        how |= {"method": args.method, "budget": args.budget} if args.method else {}
        how |= {"select": args.select, "keep": args.keep} if args.select else {}
        args.json.write_text(json.dumps({"settings": how, "kinds": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
