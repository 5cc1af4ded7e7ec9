"""``duet-vlm eval --harness lmms-eval``: which runs it starts, what it repeats, what it does when one fails. lmms-eval itself: test_lmms.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from duet_vlm.cli.main import app
from duet_vlm.evaluation import lmms

WORDS = ["eval", "--harness", "lmms-eval", "--tasks", "pope,gqa", "--methods", "duet[text_query=last]", "--budgets", "64", "--limit", "5"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def run(model: str, tasks: list[str], **given: Any) -> dict[str, Any]:
        calls.append({"model": model, "tasks": list(tasks)} | given)
        if given.get("preset") == "duet-128":
            raise RuntimeError("lmms-eval ended without results (exit code 1): no room")
        return {"tasks": {"pope": {"accuracy": 0.8125}}, "measured": {"tasks": {"pope": {"nominal_mean": 64.0, "measured_mean": 63.75}}}}

    monkeypatch.setattr(lmms, "run", run)
    return calls


def test_every_run_goes_through_the_harness_once(started: list[dict[str, Any]], tmp_path: Path) -> None:
    words = [*WORDS, "--presets", "duet-64,duet-128", "--out", str(tmp_path), "--batch", "2"]
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0, first.output
    asked = [(c.get("preset"), c.get("method"), c.get("budget"), c.get("settings")) for c in started]
    duet = (None, "duet", 64, {"text_query": "last"})
    assert asked == [(None, "none", None, {}), duet, ("duet-64", None, None, None), ("duet-128", None, None, None)]
    assert all(c["tasks"] == ["pope", "gqa"] and c["limit"] == 5 and c["batch"] == 2 for c in started)
    assert len({c["out"] for c in started}) == 4
    assert "0.8125" in first.output and "63.8" in first.output and "no room" in " ".join(first.output.split())
    CliRunner().invoke(app, words)
    assert len(started) == 5 and started[-1]["preset"] == "duet-128", "only the failed run is tried again"


def test_what_the_harness_cannot_do_is_said(started: list[dict[str, Any]], tmp_path: Path) -> None:
    found = CliRunner().invoke(app, [*WORDS, "--oracle", "--out", str(tmp_path)])
    assert found.exit_code == 2 and "--oracle" in found.stderr and not started
