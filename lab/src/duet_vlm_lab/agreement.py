"""Agreement of the embedded benches with print: rank correlation of what methods keep here with what papers report for
LLaVA-1.5-7B at the same share of its tokens.

    python -m duet_vlm_lab.agreement        # writes lab/comparison/agreement.json

Only rows as they come count: methods with their own settings. A method that several sources print has the median of
their figures. Intervals are percentiles over resampled methods and, for what is kept here, resampled questions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

import duet_vlm
from duet_vlm.evaluation.results import load, unpack
from duet_vlm.evaluation.tasks import accepted
from duet_vlm.reducers.decoder import DecoderReducer
from duet_vlm.reducers.encoder import EncoderReducer

SHARES = {192: 0.33, 128: 0.22, 64: 0.11}  # tokens of 576 -> budget here
RESAMPLED, LEAST, SEED = 2000, 5, 0
BASELINE = "none"
COMPARISON = Path(__file__).parents[2] / "comparison"


def before(method: str) -> bool:
    """The method reduces before the decoder, and nowhere else."""
    kind = duet_vlm.get_method(method)
    return issubclass(kind, EncoderReducer) and not issubclass(kind, DecoderReducer)


def inside(method: str) -> bool:
    """The method reduces inside the decoder, and nowhere else."""
    kind = duet_vlm.get_method(method)
    return issubclass(kind, DecoderReducer) and not issubclass(kind, EncoderReducer)


GROUPS: dict[str, Callable[[str], bool]] = {"all": lambda method: True, "before": before, "inside": inside}


def published() -> dict[str, Any]:
    """The figures in print, with their sources."""
    return json.loads(files("duet_vlm_lab").joinpath("published.json").read_text(encoding="utf-8"))


def in_print(tokens: int, tables: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share kept in % of each method with a figure at ``tokens``: the median over the tables that have one."""
    figures: dict[str, list[float]] = {}
    for table in tables:
        for method, kept in table["kept"].items():
            if str(tokens) in kept:
                figures.setdefault(method, []).append(kept[str(tokens)])
    return {method: statistics.median(values) for method, values in figures.items()}


def one_source(tables: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The tables over one set of benchmarks that have the most methods: the first one, and those that continue it."""
    return [table for table in tables if table is tables[0] or table["benchmarks"] == "as TRIO"]


def hits_of(result: Mapping[str, Any], share: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Right answers [questions] of the full model and of each method that ran with its own settings at ``share``."""
    answers = unpack(dict(result))
    right = {
        name: np.array([accepted(said, gold) for said, gold in zip(given, answers["gold"], strict=True)])
        for name, given in answers["answers"].items()
    }
    names = {row["method"]: row["id"] for row in result["runs"] if row["id"] == f"{row['method']}@{share}"}
    return right[BASELINE], {method: right[name] for method, name in names.items() if name in right}


def correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Spearman's rho and Kendall's tau-b; nan where one side is constant."""
    from scipy.stats import kendalltau, spearmanr

    if len(set(x)) < 2 or len(set(y)) < 2:
        return float("nan"), float("nan")
    return float(spearmanr(x, y).statistic), float(kendalltau(x, y).statistic)


def agreement(result: Mapping[str, Any], printed: Mapping[str, float], share: float) -> dict[str, Any] | None:
    """Correlation over the methods that both sides have; None where fewer than ``LEAST`` are left, or all keep the
    same."""
    full, here = hits_of(result, share)
    methods = sorted(printed.keys() & here.keys())
    if len(methods) < LEAST:
        return None
    theirs, hits = np.array([printed[m] for m in methods]), np.stack([here[m] for m in methods])
    rho, tau = correlation(theirs, hits.sum(1) / full.sum())
    if np.isnan(rho):
        return None
    draw = np.random.default_rng(SEED)
    rhos = []
    for _ in range(RESAMPLED):
        some = draw.integers(len(methods), size=len(methods))
        questions = draw.integers(hits.shape[1], size=hits.shape[1])
        rhos.append(correlation(theirs[some], hits[some][:, questions].sum(1))[0])
    low, high = np.nanpercentile(rhos, [2.5, 97.5])
    return {"methods": methods, "rho": rho, "tau": tau, "rho_interval": [float(low), float(high)]}


def measured(benches: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each bench, number of tokens and group of methods."""
    tables, rows = published()["tables"], []
    for bench in benches:
        result = load(COMPARISON / bench / "results" / "methods.json")
        for tokens, share in SHARES.items():
            sides = {name: {m: v for m, v in in_print(tokens, tables).items() if of(m)} for name, of in GROUPS.items()}
            sides["one source"] = in_print(tokens, one_source(tables))
            for group, printed in sides.items():
                found = agreement(result, printed, share)
                if found is not None:
                    rows.append({"bench": bench, "tokens": tokens, "share": share, "group": group, **found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benches", nargs="+", default=["tiny", "tiny-chain", "tiny-crowded", "tiny-page"])
    parser.add_argument("--out", type=Path, default=COMPARISON / "agreement.json")
    given = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=COMPARISON)
    rows = measured(given.benches)
    made = {"model": published()["model"], "commit": commit.stdout.strip(), "resampled": RESAMPLED, "rows": rows}
    given.out.write_text(json.dumps(made, indent=1) + "\n")
    for row in rows:
        low, high = row["rho_interval"]
        place = f"{row['bench']:<13} {row['tokens']:>4} {row['group']:<11} n {len(row['methods']):>2}"
        print(f"{place}  rho {row['rho']:5.2f} ({low:.2f} to {high:.2f})  tau {row['tau']:5.2f}")


if __name__ == "__main__":
    main()
