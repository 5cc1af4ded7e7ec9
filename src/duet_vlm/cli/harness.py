"""``duet-vlm eval --harness lmms-eval``: every run through lmms-eval, one after the other."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from duet_vlm.evaluation.results import save

if TYPE_CHECKING:
    from duet_vlm.evaluation.experiment import Experiment


def through_lmms_eval(job: Experiment, tasks: Sequence[str], device: str | None, out: Path, restart: bool, as_json: bool) -> list[dict[str, Any]]:
    """A folder per run under ``out``, and a table at the end, unless ``as_json``: then lmms-eval writes to stderr.
    Finished runs are not repeated; a failed one is a row, not an abort."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        outcomes = _run_all(job, tasks, device, out, restart)
    if not as_json:
        Console().print(_table(outcomes))
    return [{"run": name} | result for name, result in outcomes.items()]


def _run_all(job: Experiment, tasks: Sequence[str], device: str | None, out: Path, restart: bool) -> dict[str, dict[str, Any]]:
    from duet_vlm.evaluation import lmms

    console, outcomes = Console(), {}
    for run in job.runs():
        job_facts = {"model": job.model, "tasks": list(tasks), "run": run.id, "limit": job.limit}
        mark = hashlib.sha256(json.dumps(job_facts).encode()).hexdigest()[:8]
        folder = out / f"{run.method}-{mark}"
        file = folder / "result.json"
        if file.exists() and not restart:
            outcomes[run.id] = json.loads(file.read_text())["result"]
            continue
        console.rule(run.id)
        method = {"preset": run.preset} if run.preset else {"method": run.method, "budget": run.budget, "settings": run.settings}
        try:
            outcomes[run.id] = lmms.run(job.model, tasks, **method, limit=job.limit, batch=job.batch, device=device, out=folder)
        except RuntimeError as error:
            outcomes[run.id] = {"failed": str(error)}
            continue
        save(file, {"asked": job_facts, "result": outcomes[run.id]})
    return outcomes


def _table(outcomes: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="lmms-eval", title_justify="left")
    for column in ("run", "nominal tokens", "measured", "task", "metrics"):
        table.add_column(column)
    for name, result in outcomes.items():
        if "failed" in result:
            table.add_row(name, "", "", "failed", result["failed"])
            continue
        for task, metrics in result["tasks"].items():
            words = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if "stderr" not in key)
            cost = result["measured"]["tasks"].get(task, {})  # a group of tasks has none of its own
            tokens = [f"{cost[key]:.1f}" if cost else "" for key in ("nominal_mean", "measured_mean")]
            table.add_row(name, *tokens, task, words)
    return table
