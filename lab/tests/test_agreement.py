"""Agreement of the benches with print: figures by their sources, and correlations against plain formulas."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import duet_vlm
from duet_vlm_lab import agreement
from duet_vlm_lab.agreement import BASELINE, correlation, in_print, one_source, published


def rho_by_hand(x: list[float], y: list[float]) -> float:
    """Pearson's correlation of mean ranks."""

    def ranks(values: list[float]) -> list[float]:
        return [sum(v < u for v in values) + (sum(v == u for v in values) + 1) / 2 for u in values]

    a, b = np.array(ranks(x)), np.array(ranks(y))
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))


def tau_by_hand(x: list[float], y: list[float]) -> float:
    pairs = list(itertools.combinations(zip(x, y, strict=True), 2))
    signs = [np.sign(a[0] - b[0]) * np.sign(a[1] - b[1]) for a, b in pairs]
    untied = [sum(a[k] != b[k] for a, b in pairs) for k in (0, 1)]
    return float(sum(signs) / np.sqrt(untied[0] * untied[1]))


@pytest.mark.parametrize("seed", range(4))
def test_correlations_are_those_of_their_definitions(seed: int) -> None:
    draw = np.random.default_rng(seed)
    x, y = draw.integers(0, 6, 9).astype(float), draw.normal(size=9)
    rho, tau = correlation(x, y)
    assert rho == pytest.approx(rho_by_hand(x.tolist(), y.tolist())) and tau == pytest.approx(
        tau_by_hand(x.tolist(), y.tolist())
    )
    assert np.isnan(correlation(np.ones(4), np.arange(4.0))[0])


def test_a_figure_of_several_sources_is_their_median() -> None:
    tables = [
        {"kept": {"a": {"64": 90.0}}},
        {"kept": {"a": {"64": 94.0}, "b": {"192": 1.0}}},
        {"kept": {"a": {"64": 91.0}}},
    ]
    assert in_print(64, tables) == {"a": 91.0} and in_print(192, tables) == {"b": 1.0}


def test_every_figure_has_a_source_a_method_and_a_share() -> None:
    tables = published()["tables"]
    assert all(table["source"] and table["benchmarks"] for table in tables)
    for table in tables:
        for method, kept in table["kept"].items():
            duet_vlm.get_method(method)
            assert set(kept) <= {"192", "128", "64"} and all(50 < share <= 101 for share in kept.values())
    together = in_print(192, one_source(tables))
    assert {"sieve", "pio", "fastv"} <= together.keys() and "zoo_prune" not in together


def test_methods_that_agree_wholly_and_wholly_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a", "b", "c", "d", "e", "f"]
    hits = {name: np.arange(200) < 30 * (number + 1) for number, name in enumerate(names)}
    monkeypatch.setattr(agreement, "hits_of", lambda result, share: (np.ones(200, bool), hits))
    monkeypatch.setattr(agreement, "RESAMPLED", 50)
    up: Any = agreement.agreement({}, {name: 80.0 + number for number, name in enumerate(names)}, 0.22)
    down: Any = agreement.agreement({}, {name: 80.0 - number for number, name in enumerate(names)}, 0.22)
    assert [up["rho"], up["tau"], down["rho"], down["tau"]] == pytest.approx([1, 1, -1, -1])
    assert up["rho_interval"] == pytest.approx([1, 1])
    assert agreement.agreement({}, {name: 80.0 for name in names}, 0.22) is None  # print says nothing
    assert agreement.agreement({}, {"a": 1.0, "b": 2.0}, 0.22) is None  # too few


def test_rows_as_they_come_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [{"method": "duet", "id": "duet@0.22"}, {"method": "duet", "id": "duet[cluster_width=2]@0.22"}]
    said = {
        "gold": [["x"], ["y"]],
        "answers": {BASELINE: ["x", "y"], "duet@0.22": ["x", "z"], runs[1]["id"]: ["z", "z"]},
    }
    monkeypatch.setattr(agreement, "unpack", lambda result: said)
    full, here = agreement.hits_of({"runs": runs}, 0.22)
    assert full.tolist() == [True, True] and {k: v.tolist() for k, v in here.items()} == {"duet": [True, False]}
