"""The tables of docs/train-with-reduction.md, from the answers under comparison/training.

Models of one config differ by the seed of their training. A question counts with the share of these models that answer it right; intervals
are bootstraps over questions, so they hold for these models and new questions, and the spread over seeds is shown beside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from duet_vlm.evaluate.report.markdown import table
from duet_vlm.evaluate.results import load, unpack
from duet_vlm.evaluate.statistics import difference_interval, kept_interval
from duet_vlm.evaluate.tasks import accepted

HOME = Path(__file__).resolve().parent.parent / "comparison" / "training"
TASKS = ("tiny", "tiny-crowded")
BUDGETS = (0.33, 0.22, 0.11, 0.07, 0.05)
TRAINED = {
    "full": "in full (drops are training-free)",
    "duet-33": "at 33 %",
    "duet-11": "at 11 %",
    "duet-07": "at 7 %",
    "duet-05": "at 5 %",
    "annealed": "100 % falling to 11 %",
    "mixed": "mixed: 100, 33, 22, 11, 7 %",
}


def seeds(config: str) -> list[int]:
    """Seeds for which every task was answered."""
    return [seed for seed in range(9) if all((HOME / task / "results" / f"{config}-{seed}.json").exists() for task in TASKS)]


@functools.cache
def right(config: str, seed: int) -> dict[str, np.ndarray]:
    """[questions] bool per run, the questions of all tasks one after the other."""
    out: dict[str, list[np.ndarray]] = {}
    for task in TASKS:
        found = unpack(load(HOME / task / "results" / f"{config}-{seed}.json"))
        for run, said in found["answers"].items():
            hits = [accepted(answer, gold) for answer, gold in zip(said, found["gold"], strict=True)]
            out.setdefault(run, []).append(np.array(hits))
    return {run: np.concatenate(parts) for run, parts in out.items()}


def hits(config: str, run: str, common: Iterable[int]) -> np.ndarray | None:
    """[seeds, questions], None where a seed lacks the run."""
    rows = [right(config, seed).get(run) for seed in common]
    return np.stack(rows) if rows and all(row is not None for row in rows) else None


def _run(budget: float | None) -> str:
    return "none" if budget is None else f"duet@{budget:g}"


def kept() -> str:
    """Accuracy of every model at every budget, as a share of the model trained and run in full."""
    lines = []
    for config, name in TRAINED.items():
        common = [seed for seed in seeds(config) if seed in seeds("full")]
        line = [name, str(len(common))]
        for budget in (None, *BUDGETS):
            ours, full = hits(config, _run(budget), common), hits("full", "none", common)
            line.append("-" if ours is None or full is None else _kept(ours, full))
        lines.append(line)
    return table(["trained", "models", "run in full", *(f"at {b:.0%}" for b in BUDGETS)], lines)


def _kept(ours: np.ndarray, full: np.ndarray) -> str:
    low, high = kept_interval(ours.mean(0), full.mean(0)) or (0.0, 0.0)
    return f"{100 * ours.mean() / full.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"


def gained() -> str:
    """Points that training with reduction gains over dropping from the model trained in full, at the same budget."""
    lines = []
    for config in [c for c in TRAINED if c != "full"]:
        common = [seed for seed in seeds(config) if seed in seeds("full")]
        line = [TRAINED[config]]
        for budget in (None, *BUDGETS):
            ours, free = hits(config, _run(budget), common), hits("full", _run(budget), common)
            line.append("-" if ours is None or free is None else _gain(ours, free))
        lines.append(line)
    return table(["trained", "run in full", *(f"at {b:.0%}" for b in BUDGETS)], lines)


def _gain(ours: np.ndarray, free: np.ndarray) -> str:
    low, high = difference_interval(ours.mean(0), free.mean(0))
    each = ", ".join(f"{100 * (a.mean() - b.mean()):+.1f}" for a, b in zip(ours, free, strict=True))
    mark = " ▲" if low > 0 else " ▼" if high < 0 else ""
    return f"{100 * (ours.mean() - free.mean()):+.1f} ({100 * low:+.1f} to {100 * high:+.1f}){mark}; seeds {each}"


def absolute() -> str:
    """Plain accuracies, to see what the shares are shares of."""
    lines = []
    for config, name in TRAINED.items():
        common = seeds(config)
        cells = [hits(config, _run(budget), common) for budget in (None, *BUDGETS)]
        lines.append([name, *("-" if cell is None else f"{cell.mean():.3f}" for cell in cells)])
    return table(["trained", "run in full", *(f"at {b:.0%}" for b in BUDGETS)], lines)


BLOCKS: dict[str, Callable[[], str]] = {"training_kept": kept, "training_gained": gained, "training_accuracy": absolute}
