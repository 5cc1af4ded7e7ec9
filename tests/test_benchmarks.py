"""The speed benchmarks run end to end at tiny shapes and write complete result files; what they measure is not asserted
here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "benchmarks" / "run.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    words = [sys.executable, str(RUN), "--quick", "--threads", "1", "--out", str(out)]
    subprocess.run(words, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=300)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v2v", "greedy", "t2v", "decode", "prefill", "train_step"])
def test_quick_results_are_complete(results: Path, name: str) -> None:
    data = json.loads((results / f"{name}.json").read_text())
    assert data["quick"] is True
    assert {"torch", "transformers", "threads", "cpu", "dtype", "attention", "commit"} <= set(data["environment"])
    measured = [row for row in data["results"] if row.get("status") != "infeasible"]
    assert measured
    for row in measured:
        low, high = row["interval"]
        assert 0 < low <= row["median"] <= high
        assert row["quartiles"][0] <= row["median"] <= row["quartiles"][1]
        assert row["pairs"] == 3 and row["shape"]["hidden"] > 0
    if name == "t2v":  # held against what its arithmetic took in the same prefills
        assert len(measured) == 4
        for row in measured:
            assert row["target"] == pytest.approx(row["arithmetic"]["median"] + 0.02) and row["met"] == (
                row["median"] <= row["target"]
            )
    if name == "prefill":
        assert all(row["predicted"] > 1 for row in measured)
    if name == "train_step":
        assert [row["side"] for row in measured] == 2 * [
            "duet at 33%", "duet at 22%", "duet at 11%", "duet_plus at 11%",
            "duet_plus at 11%, 50% of the patches", "duet_plus at 11%, 40% of the patches", "duet at 11%, checkpointing"
        ]  # fmt: skip
        for row in measured:
            assert 0 < row["predicted"] < 1 and 0 < row["memory_mib"][0] < row["memory_mib"][1]
            assert 0 < row["activations_mib"][0] < row["activations_mib"][1] < row["memory_mib"][1]
            assert list(row["stages"]) == ["vision", "decoder", "backward", "optimiser"]
