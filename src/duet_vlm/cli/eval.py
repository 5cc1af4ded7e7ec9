"""``duet-vlm eval``: accuracy against budget, for any method, on the same questions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from duet_vlm.cli.errors import friendly
from duet_vlm.cli.options import Debug, Device, Model, budget_of, settings_of

METHODS = "duet,visionzip,pyramiddrop,fastv,random,uniform"


def evaluate(
    tasks: Annotated[str, typer.Option("--tasks", help="tiny, tiny-crowded, tiny-chain, tiny-video, or .jsonl files, with commas between.")] = "tiny",
    model: Model = "tiny",
    methods: Annotated[
        str | None,
        typer.Option("--methods", help=f"Methods with commas between, settings in brackets: duet[text_query=last]. Default: {METHODS}."),
    ] = None,
    budgets: Annotated[str, typer.Option("--budgets", help="As for --budget elsewhere, with commas between.")] = "0.33,0.22,0.11",
    presets: Annotated[str | None, typer.Option("--presets", help="Named presets to run as well, with commas between.")] = None,
    oracle: Annotated[bool, typer.Option("--oracle", help="Add the upper bound that knows which tokens the answer needs.")] = False,
    seeds: Annotated[str, typer.Option("--seeds", help="Streams of questions, with commas between.")] = "0",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="The first N questions of each seed.")] = None,
    against: Annotated[str, typer.Option("--against", help="The method that all others are tested against (its label).")] = "duet",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Questions per batch.")] = 40,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes; default: one per core without a GPU, else 1.")] = None,
    timing_rounds: Annotated[int, typer.Option("--timing-rounds", min=0, help="Rounds of the prefill timing; 0 leaves it out.")] = 20,
    experiment: Annotated[
        Path | None, typer.Option("--experiment", help="An experiment file instead of tasks, model, methods, budgets, seeds, limit ...")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="What the result is called.")] = "eval",
    out: Annotated[Path, typer.Option("--out", help="Folder for TASK/experiments and TASK/results.")] = Path("comparison"),
    restart: Annotated[bool, typer.Option("--restart", help="Drop an unfinished or finished result of that name and begin anew.")] = False,
    harness: Annotated[str, typer.Option("--harness", help="'own' or 'lmms-eval' (then --tasks are its tasks).")] = "own",
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Measure accuracy, tokens, FLOPs, KV bytes and prefill time of methods and budgets, beside the full model, on the same questions.

    Start the same command again after a kill and it goes on where it stopped.
    """
    with friendly(debug):
        from duet_vlm.evaluate.experiment import Experiment, read

        if harness not in ("own", "lmms-eval"):
            raise ValueError(f"--harness {harness}: give 'own' or 'lmms-eval'")
        if experiment is not None:
            jobs, name = [read(experiment)], experiment.stem
        else:
            if methods is None:
                methods = "" if presets else METHODS
            cells = _cells(methods, budgets, presets, oracle)
            numbers = tuple(_seed(text) for text in _listed(seeds))
            jobs = [Experiment(task, cells, model, numbers, limit, batch, against) for task in _listed(tasks)]
        if harness == "lmms-eval":
            from duet_vlm.cli.harness import through_lmms_eval

            if oracle or experiment is not None:
                raise ValueError("--oracle and --experiment need the own harness: lmms-eval's tasks do not say which tokens an answer needs")
            through_lmms_eval(model, _listed(tasks), jobs[0].runs(), limit, batch, device, out / "lmms-eval", restart)
            return
        for job in jobs:
            _measure(job, name, out, restart, workers, timing_rounds, device)


def _measure(job: Any, name: str, out: Path, restart: bool, workers: int | None, timing_rounds: int, device: str | None) -> None:
    import json

    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from duet_vlm.evaluate.results import load, save
    from duet_vlm.evaluate.run import run_experiment
    from duet_vlm.evaluate.screen import show
    from duet_vlm.evaluate.tasks import task

    folder = out / task(job.task).name
    result, journal = folder / "results" / f"{name}.json", folder / "results" / f"{name}.partial.jsonl"
    if restart:
        result.unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
    if result.exists():
        if load(result)["experiment"] != job.to_json():
            raise ValueError(f"{result} holds another experiment; choose another --name, or --restart to replace it")
        typer.echo(f"{result} is finished already (--restart measures again)")
        return
    file = folder / "experiments" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(job.to_json(), indent=1) + "\n")
    accelerated = torch.cuda.is_available() and not (device or "").startswith("cpu")
    processes = workers or (1 if accelerated else os.cpu_count() or 1)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(f"{job.task}: batches of {job.batch}", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        found = run_experiment(job, name, journal, device=device, workers=processes, timing_rounds=timing_rounds, advance=advance)
    save(result, found)
    journal.unlink()
    show(found)
    typer.echo(f"written: {result}\nnext: duet-vlm report {result}")


def _cells(methods: str, budgets: str, presets: str | None, oracle: bool) -> tuple[dict[str, Any], ...]:
    from duet_vlm.evaluate.experiment import cells_of

    wanted = [budget_of(text) for text in _listed(budgets)]
    named = cells_of(methods) if methods.strip() else []
    cells: list[dict[str, Any]] = [{"method": method, "budgets": wanted, "settings": settings_of(pairs)} for method, pairs in named]
    cells += [{"preset": preset} for preset in _listed(presets or "")]
    return (*cells, {"method": "oracle", "budgets": wanted}) if oracle else tuple(cells)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _seed(text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"--seeds {text}: give integers, 0 or more, with commas between")
    return int(text)
