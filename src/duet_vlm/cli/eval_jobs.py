"""Experiments from the command line: checked first, measured into a result file, resumed from their journal."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from duet_vlm.cli.errors import folder_for

if TYPE_CHECKING:
    from duet_vlm.evaluation.experiment import Experiment
    from duet_vlm.evaluation.ranks import WorkerRank
    from duet_vlm.evaluation.run import RunAnswers


@dataclass(frozen=True)
class JobOptions:
    """Options of a measurement.

    Attributes
    ----------
    out : Path
        Folder for TASK/experiments and TASK/results.
    restart : bool
        Delete an earlier result of the name.
    workers : int
        Processes that answer.
    timing_rounds : int
        Rounds of the prefill timing.
    device : str or None
        Device.
    quiet : bool
        Print nothing.
    worker : WorkerRank
        Rank of this process among those of a launcher.
    """

    out: Path
    restart: bool
    workers: int
    timing_rounds: int
    device: str
    quiet: bool
    worker: WorkerRank

    @staticmethod
    def checked(
        out: Path, restart: bool, workers: int | None, timing_rounds: int, device: str | None, quiet: bool
    ) -> JobOptions:
        """Options with an existing device, a writable folder, and the default number of processes."""
        from duet_vlm.api.loading import device_for
        from duet_vlm.evaluation.ranks import WorkerRank, gpus

        worker = WorkerRank.here()
        where = device_for(worker.device(device, gpus()))
        if restart:
            worker.check_restart(f"result and .parts folder of that name in {out}/TASK/results")
        if worker.world > 1 and (workers or 1) > 1:
            raise ValueError(
                f"--workers {workers}: a launcher has started {worker.world} processes; have it start more of them instead"
            )
        if worker.world > 1:
            usual = 1
        else:
            usual = os.cpu_count() or 1 if where.startswith("cpu") else max(1, gpus()) if where == "cuda" else 1
        return JobOptions(folder_for("--out", out), restart, workers or usual, timing_rounds, where, quiet, worker)


def check_tasks(jobs: list[Experiment]) -> None:
    """Check all tasks before the first one takes its time."""
    from duet_vlm.evaluation.tasks import task

    names = []
    for job in jobs:
        known_task = task(job.task)
        known_task.count(job.limit)
        names.append(known_task.name)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"--tasks: two are called {', '.join(twice)} and would have one result; run them one by one, with different --out"
        )


def run_job(job: Experiment, name: str, wanted: JobOptions) -> tuple[Path, dict[str, Any] | None]:
    """One experiment, from its journals to its result file; a finished one is loaded. No result where other processes
    are not done yet."""
    from duet_vlm.evaluation.console import show
    from duet_vlm.evaluation.journal import alone
    from duet_vlm.evaluation.results import load, save
    from duet_vlm.evaluation.tasks import task

    job_task = task(job.task)
    folder = wanted.out / job_task.name
    result, journals = folder / "results" / f"{name}.json", folder / "results" / f"{name}.parts"
    made = False
    try:
        with alone(journals / f"{wanted.worker.rank}.jsonl"):
            if wanted.restart:
                result.unlink(missing_ok=True)
                for journal in journals.glob("*.jsonl"):
                    journal.unlink()
            if result.exists() and load(result)["experiment"] != job.to_json():
                raise ValueError(
                    f"{result} holds another experiment; choose another --name, or --restart to replace it"
                )
            if result.exists() and load(result)["questions"].get("contents") != job_task.digest(
                job_task.count(job.limit)
            ):
                other = f"answers to other questions or pictures than {job.task} has now"
                raise ValueError(f"{result} holds {other}; choose another --name, or --restart to replace it")
            if not result.exists():
                save(folder / "experiments" / f"{name}.json", job.to_json())
                made = _made(job, name, result, journals, wanted)
    finally:
        _tidy(result, journals)
    finished = load(result) if result.exists() else None
    if not wanted.quiet:
        if finished is None:
            typer.echo(f"{wanted.worker} is done; {result} is written by the last of them", err=True)
        elif made:
            show(finished)
            typer.echo(f"written: {result}\nnext: duet-vlm report {result}")
        else:
            typer.echo(f"{result} is finished already (--restart measures again)")
    return result, finished


def tell_progress(file: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The result without its predictions."""
    return {"file": str(file)} | {key: value for key, value in result.items() if key != "predictions"}


def _made(job: Experiment, name: str, result: Path, journals: Path, wanted: JobOptions) -> bool:
    """Ask, and write the result unless others are not done yet or one of them does: whether this process has written
    it."""
    from duet_vlm.evaluation.journal import HeldError, alone
    from duet_vlm.evaluation.results import save

    answers = _asked(job, journals, wanted, result.exists)
    if answers is None:
        return False
    try:
        with alone(journals / "result"):
            if result.exists():
                return False
            save(result, answers.result(name, wanted.timing_rounds))
            return True
    except HeldError:
        if wanted.worker.world == 1:
            raise
        return False


def _tidy(result: Path, journals: Path) -> None:
    """Remove journals that are no longer needed. The result is written before, so that a process that misses them finds
    the result."""
    if result.exists():
        shutil.rmtree(journals, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            journals.rmdir()  # unless there is something in it


def _asked(job: Experiment, journals: Path, wanted: JobOptions, over: Callable[[], bool]) -> RunAnswers | None:
    """The answers, with a bar on stderr, or lines where several processes write to it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from duet_vlm.evaluation.run import gather

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True))
    bar = progress.add_task(f"{job.task}: batches of {job.batch}", total=None)

    def advance(done: int, total: int) -> None:
        if wanted.worker.world > 1:
            typer.echo(f"{wanted.worker}: {done} of {total} batches of {job.task}", err=True)
            return
        progress.start()  # nothing is shown before everything has been found right
        progress.update(bar, completed=done, total=total)

    try:
        return gather(
            job,
            journals,
            device=wanted.device,
            workers=wanted.workers,
            worker=wanted.worker,
            advance=advance,
            over=over,
        )
    finally:
        if progress.live.is_started:
            progress.stop()
