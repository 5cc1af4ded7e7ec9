"""A made-up result file of `duet-vlm eval`, as large as one likes, for the tests of the report. The numbers mean
nothing."""

from __future__ import annotations

import math
import random
from typing import Any

KINDS = ("attribute", "existence", "read_digit", "read_word", "count", "spatial", "compare")
BUDGETS = (0.33, 0.22, 0.11, 0.07, 0.05)
FULL, LAYERS, COUNT = 256, 12, 6000
# label -> (method, share of answers lost per halving of tokens, smallest budget, scoring overhead in ms)
METHODS = {
    "duet": ("duet", 0.010, 0.0, 0.30),
    "duet_plus": ("duet_plus", 0.004, 0.0, 0.45),
    "scope": ("scope", 0.006, 0.0, 0.50),
    "divprune": ("divprune", 0.018, 0.0, 0.45),
    "visionzip": ("visionzip", 0.030, 0.0, 0.20),
    "pyramiddrop": ("pyramiddrop", 0.022, 0.06, 0.35),
    "fastv": ("fastv", 0.080, 0.09, 0.25),
    "duet, last query": ("duet", 0.012, 0.0, 0.28),
    "random": ("random", 0.16, 0.0, 0.05),
    "uniform": ("uniform", 0.13, 0.0, 0.05),
    "random, DUET's schedule": ("random", 0.14, 0.0, 0.25),
    "oracle": ("oracle", 0.001, 0.0, 0.05),
}


def made_up(
    labels: int = 12, budgets: tuple[float, ...] = BUDGETS, timed: bool = True, seed: int = 0
) -> dict[str, Any]:
    """``labels`` methods at every budget; some infeasible; the oracle is always among them."""
    rng = random.Random(seed)
    chosen = dict([*list(METHODS.items())[: labels - 1], ("oracle", METHODS["oracle"])])
    rows = [_run(rng, "full model", "none", None, 0.98, FULL, timed, 0.0)]
    for budget in budgets:
        for label, (method, loss, smallest, overhead) in chosen.items():
            if budget < smallest:
                rows.append(_infeasible(label, method, budget, FULL * smallest))
                continue
            accuracy = min(0.985, 0.98 * (1 - loss * max(0.0, math.log2(0.4 / budget))) + rng.uniform(-0.002, 0.002))
            rows.append(
                _run(rng, label, method, budget, accuracy, FULL * budget + rng.uniform(-0.6, 0.2), timed, overhead)
            )
    _compare(rng, rows)
    return {
        "format": 1,
        "name": "methods",
        "task": "tiny",
        "experiment": {
            "task": "tiny",
            "model": "tiny",
            "seeds": [0, 1, 2],
            "limit": 2000,
            "batch": 40,
            "against": "duet",
            "cells": [
                {"method": method, "label": label, "budgets": list(budgets)} for label, (method, *_) in chosen.items()
            ],
        },
        "environment": {
            "duet_vlm": "0.1.0",
            "torch": "2.13.0",
            "cpu": "made-up processor",
            "device": "cpu",
            "date": "2026-01-01",
        },
        "model": {"name": "tiny", "family": "llava", "parameters": 3700000, "weights": "0123456789abcdef"},
        "questions": {"count": COUNT, "per_seed": COUNT // 3, "kinds": {kind: COUNT // len(KINDS) for kind in KINDS}},
        "runs": rows,
        "predictions": {"encoding": "json+xz+base64", "data": ""},
    }


def _id(label: str, budget: float | None) -> str:
    return label if budget is None else f"{label}@{budget:g}"


def _infeasible(label: str, method: str, budget: float, floor: float) -> dict[str, Any]:
    message = f"budget {budget} is below the floor of {method}: {floor:.1f} tokens; ask for more"
    return _row(label, method, budget) | {"status": "infeasible", "floor": floor, "message": message}


def _row(label: str, method: str, budget: float | None) -> dict[str, Any]:
    settings = (
        {}
        if method in ("none", "oracle")
        else {"options": {"text_query": "all"}, "schedule": [[6, 0.5], [9, 0.0]], "width": 4}
    )
    return {
        "id": "none" if method == "none" else _id(label, budget),
        "label": label,
        "method": method,
        "budget": budget,
        "settings": settings,
    }


def _run(
    rng: random.Random,
    label: str,
    method: str,
    budget: float | None,
    accuracy: float,
    tokens: float,
    timed: bool,
    overhead: float,
) -> dict[str, Any]:
    kept, width = accuracy / 0.98, 1.96 * math.sqrt(accuracy * (1 - accuracy) / COUNT)
    kinds = {}
    for kind in KINDS:
        own = kept if method == "none" else min(1.005, max(0.3, 1 - (1 - kept) * rng.uniform(0.1, 2.2)))
        base = 0.89 if kind == "count" else 0.985
        n = COUNT // len(KINDS)
        kinds[kind] = {"n": n, "accuracy": base * own, "kept": own, "kept_interval": [own - 0.01, own + 0.01]}
    entry = round(tokens * (1 if method in ("none", "visionzip") else 1.6))
    half = LAYERS // 2
    ms = 4.0 + 8.0 * tokens / FULL + overhead + rng.uniform(-0.05, 0.05)
    solved = {
        "tokens": FULL,
        "entry": entry,
        "dominant": entry,
        "contextual": 0,
        "counts": [entry] * half + [entry // 2] * (LAYERS - half),
    }
    prefill = {
        "ms": ms,
        "low": ms * 0.98,
        "high": ms * 1.03,
        "ratio": ms / 12.0,
        "ratio_interval": [ms / 12.2, ms / 11.8],
        "rounds": 20,
        "batch": 8,
    }
    return _row(label, method, budget) | {
        "status": "ok",
        "solved": solved,
        "accuracy": accuracy,
        "interval": [accuracy - width, min(1.0, accuracy + width)],
        "seeds": {str(s): accuracy + rng.uniform(-0.004, 0.004) for s in range(3)},
        "kept": kept,
        "kept_interval": [1.0, 1.0] if method == "none" else [kept - width / 2, kept + width / 2],
        "of_oracle": None,
        "kinds": kinds,
        "tokens": {"unreduced": float(FULL), "nominal": tokens + 0.03, "measured": tokens},
        "flops": 4e9 * (0.1 + 0.9 * tokens / FULL),
        "flops_share": 0.1 + 0.9 * tokens / FULL,
        "kv_bytes": 1e6 * (0.05 + 0.95 * tokens / FULL),
        "kv_share": 0.05 + 0.95 * tokens / FULL,
        "prefill": prefill if timed else None,
        "recall": {
            "questions": 5000,
            "entry": min(1.0, kept),
            "entry_or_merged": min(1.0, kept),
            "middle": 0.97 * min(1.0, kept),
        },
        "against": None,
    }


def _compare(rng: random.Random, rows: list[dict[str, Any]]) -> None:
    at = {(row["label"], row["budget"]): row for row in rows if row["status"] == "ok"}
    for (label, budget), row in at.items():
        best, other = at.get(("oracle", budget)), at.get(("duet", budget))
        if best:
            row["of_oracle"] = row["accuracy"] / best["accuracy"]
        if other and label != "duet":
            gap, p = row["accuracy"] - other["accuracy"], rng.random() ** 6
            row["against"] = {"run": other["id"], "difference": gap, "interval": [gap - 0.003, gap + 0.003]}
            row["against"] |= {"wins": 12, "losses": 30, "p_value": p, "p_adjusted": min(1.0, 3 * p)}
