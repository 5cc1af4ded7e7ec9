"""Experiments from the command line: checked first, measured into a result file, resumed from their journal."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from duet_vlm.cli.errors import folder_for

if TYPE_CHECKING:
    from duet_vlm.evaluate.experiment import Experiment


@dataclass(frozen=True)
class Wanted:
    """How to measure. ``out``: folder for TASK/experiments and TASK/results; ``quiet``: print nothing."""

    out: Path
    restart: bool
    workers: int
    timing_rounds: int
    device: str
    quiet: bool

    @staticmethod
    def checked(out: Path, restart: bool, workers: int | None, timing_rounds: int, device: str | None, quiet: bool) -> Wanted:
        """With a device that is there, a folder that can be written to, and the usual number of processes."""
        from duet_vlm.loading import device_for

        where = device_for(device)
        processes = workers or (os.cpu_count() or 1 if where.startswith("cpu") else gpus() if where == "cuda" else 1)
        return Wanted(folder_for("--out", out), restart, processes, timing_rounds, where, quiet)


def gpus() -> int:
    """How many there are."""
    import torch

    return max(1, torch.cuda.device_count())


def check_tasks(jobs: list[Experiment]) -> None:
    """All tasks are looked at before the first one takes its time."""
    from duet_vlm.evaluate.tasks import task

    names = []
    for job in jobs:
        found = task(job.task)
        found.count(job.limit)
        names.append(found.name)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--tasks: two are called {', '.join(twice)} and would have one result; run them one by one, with different --out")


def measured(job: Experiment, name: str, wanted: Wanted) -> tuple[Path, dict[str, Any]]:
    """One experiment, from its journal to its result file; what is finished is read again."""
    from duet_vlm.evaluate.journal import alone
    from duet_vlm.evaluate.results import load, save
    from duet_vlm.evaluate.screen import show
    from duet_vlm.evaluate.tasks import task

    folder = wanted.out / task(job.task).name
    result, journal = folder / "results" / f"{name}.json", folder / "results" / f"{name}.partial.jsonl"
    with alone(journal):
        if wanted.restart:
            result.unlink(missing_ok=True)
            journal.unlink(missing_ok=True)
        if result.exists():
            found = load(result)
            if found["experiment"] != job.to_json():
                raise ValueError(f"{result} holds another experiment; choose another --name, or --restart to replace it")
            if not wanted.quiet:
                typer.echo(f"{result} is finished already (--restart measures again)")
            return result, found
        file = folder / "experiments" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(job.to_json(), indent=1) + "\n")
        found = _asked(job, name, journal, wanted)
        save(result, found)
        journal.unlink()
    if not wanted.quiet:
        show(found)
        typer.echo(f"written: {result}\nnext: duet-vlm report {result}")
    return result, found


def told(file: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The result without its predictions."""
    return {"file": str(file)} | {key: value for key, value in found.items() if key != "predictions"}


def _asked(job: Experiment, name: str, journal: Path, wanted: Wanted) -> dict[str, Any]:
    """The measurement, with a bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from duet_vlm.evaluate.run import run_experiment

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True))
    bar = progress.add_task(f"{job.task}: batches of {job.batch}", total=None)

    def advance(done: int, total: int) -> None:
        progress.start()  # nothing is shown before everything has been found right
        progress.update(bar, completed=done, total=total)

    device, workers, rounds = wanted.device, wanted.workers, wanted.timing_rounds
    try:
        return run_experiment(job, name, journal, device=device, workers=workers, timing_rounds=rounds, advance=advance)
    finally:
        if progress.live.is_started:
            progress.stop()
