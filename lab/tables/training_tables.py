"""The tables of docs/train-with-reduction.md, from the answers under lab/comparison/training.

Models of one config differ by the seed of their training. A question counts with the share of these models that answer
it right; intervals are bootstraps over questions, so they hold for these models and new questions, and the spread over
seeds is shown beside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import numpy as np
from folders import COMPARISON

from duet_vlm.evaluation.report.markdown import table
from duet_vlm.evaluation.results import load, unpack
from duet_vlm.evaluation.statistics import resampled
from duet_vlm.evaluation.tasks import accepted

HOME = COMPARISON / "training"
TASKS = ("tiny", "tiny-crowded")
BUDGETS = (0.33, 0.22, 0.11, 0.07, 0.05)
TRAINED = {  # method -> config -> what the model was trained at; the first drops without having been trained for it
    "duet": {
        "full": "in full (drops are training-free)",
        "duet-33": "at 33 %",
        "duet-11": "at 11 %",
        "duet-07": "at 7 %",
        "duet-05": "at 5 %",
        "duet-11-longer": "at 11 %, three times the data",
        "annealed": "100 % falling to 11 %",
        "mixed": "mixed: 100, 33, 22, 11, 7 %",
    },
    "duet_plus": {
        "full-plus": "in full (drops are training-free)",
        "duet_plus-11": "at 11 %",
        "duet_plus-mixed": "mixed: 100, 33, 22, 11, 7 %",
    },
}
IN_TOWER = {  # the same, asked with the whole tower and with a share of the patches
    "full-in-tower": "in full",
    "duet_plus-11-in-tower": "at 11 %",
    "tower-50-in-tower": "at 11 %, 50 % of the patches in the tower",
    "tower-40-in-tower": "at 11 %, 40 % of the patches in the tower",
}


def seeds(config: str) -> list[int]:
    """Seeds for which every task was answered."""
    return [
        seed for seed in range(9) if all((HOME / task / "results" / f"{config}-{seed}.json").exists() for task in TASKS)
    ]


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


def budgets(method: str) -> list[str]:
    """The run in full, and those at every budget."""
    return ["none", *(f"{method}@{budget:g}" for budget in BUDGETS)]


def _cells(
    runs: list[str], config: str, free: str, cell: Callable[[np.ndarray, np.ndarray], str], against: str | None
) -> list[str]:
    """One line: number of models, then every run beside the same models' seeds of ``free`` (its run ``against``, or the
    same run)."""
    common = [seed for seed in seeds(config) if seed in seeds(free)]
    line = [str(len(common))]
    for run in runs:
        ours, other = hits(config, run, common), hits(free, against or run, common)
        line.append("-" if ours is None or other is None else cell(ours, other))
    return line


HEAD = ["trained", "models", "run in full", *(f"at {b:.0%}" for b in BUDGETS)]


def measured(lines: list[list[str]]) -> str:
    """The table of these lines under HEAD, without budgets that no model was asked at."""
    places = [i for i in range(len(HEAD)) if any(line[i] != "-" for line in lines)]
    return table([HEAD[i] for i in places], [[line[i] for i in places] for line in lines])


def kept(method: str) -> str:
    """Accuracy of every model at every budget, as a share of the model trained and run in full."""
    return measured(
        [
            [name, *_cells(budgets(method), config, "full", _kept, "none")]
            for config, name in TRAINED[method].items()
            if seeds(config)
        ]
    )


def _kept(ours: np.ndarray, full: np.ndarray) -> str:
    low, high = resampled(
        (ours.mean(0), full.mean(0)), lambda a, b, axis: a.mean(axis) / np.maximum(b.mean(axis), 1e-12)
    )
    return f"{100 * ours.mean() / full.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"


def gained(method: str) -> str:
    """Points that training with reduction gains over dropping from the model trained in full, at the same budget."""
    free, *others = TRAINED[method]
    return measured([[TRAINED[method][c], *_cells(budgets(method), c, free, _gain, None)] for c in others if seeds(c)])


def _gain(ours: np.ndarray, free: np.ndarray) -> str:
    low, high = resampled((ours.mean(0), free.mean(0)), lambda a, b, axis: a.mean(axis) - b.mean(axis))
    mark = " ▲" if low > 0 else " ▼" if high < 0 else ""
    return f"{100 * (ours.mean() - free.mean()):+.1f} ({100 * low:+.1f} to {100 * high:+.1f}){mark}"


def in_tower() -> str:
    """Accuracy of every model behind the whole tower and behind a share of its patches, as a share of the model trained
    and run in full."""
    runs = ["none", "duet_plus@0.11", *(f"contrast+duet_plus[contrast_keep={share}]@0.11" for share in (0.5, 0.4))]
    head = ["trained", "models", "run in full", "at 11 %", "and 50 % of the patches", "and 40 % of the patches"]
    return table(
        head,
        [
            [name, *_cells(runs, config, "full-in-tower", _kept, "none")]
            for config, name in IN_TOWER.items()
            if seeds(config)
        ],
    )


def by_seed() -> str:
    """Plain accuracies of every model, seed by seed."""
    lines = []
    for method, configs in TRAINED.items():
        for config, name in configs.items():
            for seed in seeds(config):
                found = right(config, seed)
                cells = [found.get(run) for run in budgets(method)]
                lines.append(
                    [method, name, str(seed), *("-" if cell is None else f"{cell.mean():.3f}" for cell in cells)]
                )
    return table(["method", "trained", "seed", "run in full", *(f"at {b:.0%}" for b in BUDGETS)], lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "training_kept": lambda: kept("duet"),
    "training_gained": lambda: gained("duet"),
    "training_kept_plus": lambda: kept("duet_plus"),
    "training_gained_plus": lambda: gained("duet_plus"),
    "training_in_tower": in_tower,
    "training_by_seed": by_seed,
}
