"""Rows of a result from the outcomes of all batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from duet_vlm import SpanPlan
from duet_vlm.evaluation import statistics
from duet_vlm.evaluation.experiment import BASELINE, ORACLE, Experiment, ExperimentCell
from duet_vlm.evaluation.results import unpack
from duet_vlm.evaluation.run_sample import Outcome, method_of
from duet_vlm.evaluation.tasks import TaskQuestion, accepted, right

Rows = list[dict[str, Any]]


def summarize(
    experiment: Experiment,
    runs: Sequence[ExperimentCell],
    questions: Sequence[TaskQuestion],
    outcomes: dict[str, list[Outcome]],
    times: dict[str, dict[str, Any]],
    solve: Callable[[ExperimentCell, int], SpanPlan],
) -> tuple[Rows, dict[str, Any]]:
    """Rows of the result, and its predictions. ``solve`` gives a run's plan for an image of so many tokens.

    A question without an accepted answer is judged by the full model's, so its accuracy is agreement.
    """
    infeasible = {run.id: next((part for part in outcomes[run.id] if part.message is not None), None) for run in runs}
    done = [run for run in runs if infeasible[run.id] is None]
    answers = {run.id: [said for part in outcomes[run.id] for said in part.answers] for run in done}
    judged = [
        q if q.answers else replace(q, answers=(said,)) for q, said in zip(questions, answers[BASELINE], strict=True)
    ]
    hits = {
        key: np.array([right(q, said) for q, said in zip(judged, values, strict=True)])
        for key, values in answers.items()
    }
    rows: Rows = []
    for run in runs:
        row: dict[str, Any] = {"id": run.id, "label": run.label, "method": run.method, "budget": run.budget}
        row |= {"preset": run.preset, "beside": run.beside}
        row["settings"] = (
            dict(run.settings) if run.method == ORACLE else method_of(run).with_settings(run.settings).settings()
        )
        refused = infeasible[run.id]
        if refused is not None:
            rows.append(row | {"status": "infeasible", "floor": refused.floor, "message": refused.message})
            continue
        row |= {"status": "ok"} | _accuracy(
            experiment.seeds, [q.kind for q in questions], hits[run.id], hits[BASELINE], run.id == BASELINE
        )
        row |= _costs(run, outcomes[run.id], len(questions), solve)
        rows.append(row | {"prefill": times.get(run.id), "recall": _recall(outcomes[run.id])})
    _compare(rows, hits, experiment.against)
    gold = {
        "questions": [q.id for q in questions],
        "kinds": [q.kind for q in questions],
        "gold": [list(q.answers) for q in judged],
    }
    return rows, gold | {"answers": answers}


def restated(result: dict[str, Any]) -> dict[str, Any]:
    """A result whose statistics are computed again from its predictions, for a file of an earlier version."""
    answers, experiment = unpack(result), result["experiment"]
    hits = {
        key: np.array([accepted(a, gold) for a, gold in zip(said, answers["gold"], strict=True)])
        for key, said in answers["answers"].items()
    }
    rows: Rows = copy.deepcopy(result["runs"])
    for row in rows:
        if row["status"] == "ok":
            row |= _accuracy(
                experiment["seeds"], answers["kinds"], hits[row["id"]], hits[BASELINE], row["id"] == BASELINE
            )
    _compare(rows, hits, experiment["against"])
    return result | {"runs": rows}


def _accuracy(
    seeds: Sequence[int], kinds_of: Sequence[str], hits: np.ndarray, full: np.ndarray, itself: bool
) -> dict[str, Any]:
    """Accuracy and share kept; ``itself``: this is the full model, which keeps everything whatever the questions."""
    kinds = np.array(kinds_of)
    per_seed = len(hits) // len(seeds)

    def kept(own: np.ndarray, whole: np.ndarray) -> tuple[float, float] | None:
        return (1.0, 1.0) if itself and whole.any() else statistics.kept_interval(own, whole)

    by_kind: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(kinds.tolist()):
        own, whole = hits[kinds == kind], full[kinds == kind]
        by_kind[kind] = {"n": len(own), "accuracy": float(own.mean()), "kept": _share(own.mean(), whole.mean())}
        by_kind[kind]["kept_interval"] = kept(own, whole)
    return {
        "accuracy": float(hits.mean()),
        "interval": statistics.mean_interval(hits),
        "seeds": {str(seed): float(hits[i * per_seed : (i + 1) * per_seed].mean()) for i, seed in enumerate(seeds)},
        "kept": _share(hits.mean(), full.mean()),
        "kept_interval": kept(hits, full),
        "kinds": by_kind,
    }


def _costs(
    run: ExperimentCell, parts: Sequence[Outcome], count: int, solve: Callable[[ExperimentCell, int], SpanPlan]
) -> dict[str, Any]:
    def mean(name: str) -> float:
        return math.fsum(getattr(part, name) for part in parts) / count

    sizes = {part.unreduced / part.spans for part in parts}
    solved = None
    if len(sizes) == 1 and (size := sizes.pop()).is_integer():
        plan = solve(run, int(size))
        solved = {
            "tokens": plan.tokens,
            "dominant": plan.dominant,
            "contextual": plan.contextual,
            "counts": list(plan.counts),
        }
        solved["entry"] = plan.counts[0]
    return {
        "solved": solved,
        "tokens": {"unreduced": mean("unreduced"), "nominal": mean("nominal"), "measured": mean("measured")},
        "flops": mean("flops"),
        "flops_share": mean("flops") / mean("full_flops"),
        "kv_bytes": mean("kv_bytes"),
        "kv_share": _share(mean("kv_bytes"), mean("full_kv_bytes")),
    }


def _recall(parts: Sequence[Outcome]) -> dict[str, float] | None:
    known = [part.recalls for part in parts if part.recalls is not None]
    if len(known) < len(parts):
        return None
    count, entry, merged, middle = np.sum(known, axis=0).tolist()
    return (
        {"questions": int(count), "entry": entry / count, "entry_or_merged": merged / count, "middle": middle / count}
        if count
        else None
    )


def _compare(rows: Rows, hits: dict[str, np.ndarray], label: str) -> None:
    """Difference of every run to the reference (``label``) and to the oracle at the budget ``beside``."""
    done = [row for row in rows if row["status"] == "ok"]
    reference = {row["budget"]: row for row in done if row["label"] == label}
    oracle = {row["budget"]: row for row in done if row["method"] == ORACLE}
    tested: Rows = []
    for row in done:
        best = oracle.get(row["beside"])
        row["of_oracle"] = None if best is None else _share(row["accuracy"], best["accuracy"])
        other = reference.get(row["beside"])
        row["against"] = None
        if other is None or other is row:
            continue
        own, theirs = hits[row["id"]], hits[other["id"]]
        wins, losses, p_value = statistics.sign_test(own, theirs)
        difference: dict[str, Any] = {"run": other["id"], "difference": float(own.mean() - theirs.mean())}
        difference |= {
            "interval": statistics.difference_interval(own, theirs),
            "wins": wins,
            "losses": losses,
            "p_value": p_value,
            "level": statistics.level(own, theirs),
        }
        row["against"] = difference
        tested.append(difference)
    p_values = [difference["p_value"] for difference in tested]
    rates = zip(tested, statistics.adjusted(p_values), statistics.holm(p_values), strict=True)
    for difference, false_discovery, any_error in rates:
        difference |= {"p_adjusted": false_discovery, "p_holm": any_error}


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
