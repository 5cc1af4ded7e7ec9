"""``duet-vlm eval``: accuracy against budget, for any method, on the same questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from duet_vlm.api.catalogue import check_settings, chosen
from duet_vlm.api.loading import check_model
from duet_vlm.cli.errors import GOES_ON, friendly, plain_name
from duet_vlm.cli.options import (
    SEVERAL,
    AsJson,
    ChunkFrames,
    Debug,
    Device,
    StillFrames,
    budgets_of,
    method_of,
    pieces_of,
    settings_of,
    several,
    several_paths,
)
from duet_vlm.utils.field_types import merged

if TYPE_CHECKING:
    from duet_vlm.evaluation.experiment import Experiment

METHODS = "duet,visionzip,pyramiddrop,fastv,random,uniform"
BUDGETS = "0.33,0.22,0.11"
LIMIT = 200  # questions: minutes on a CPU, intervals of a few points
EPILOG = (
    "On several machines: accelerate launch -m duet_vlm.cli.main eval ..., with --out on a folder that all of them see."
)
OUT = Path("out/eval")  # lab/comparison/ holds the results that this repository publishes

Texts = list[str] | None


def evaluate(
    tasks: Annotated[
        Texts,
        typer.Option(
            "--tasks",
            "--task",
            help=f"tiny, a task of duet-vlm-lab (tiny-chain), or .jsonl files. {SEVERAL} Default: tiny.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A local folder, or a hub id. Default: the embedded model for the task."),
    ] = None,
    methods: Annotated[
        Texts,
        typer.Option(
            "--methods",
            "--method",
            help=f"Settings in brackets: duet[options.text_query=last]; or duet.json, ./mine.py. {SEVERAL} Default: {METHODS}.",
        ),
    ] = None,
    budgets: Annotated[
        Texts, typer.Option("--budgets", "--budget", "-b", help=f"{SEVERAL} Default: {BUDGETS}.")
    ] = None,
    presets: Annotated[
        Texts, typer.Option("--presets", "--preset", help=f"Named presets to run as well. {SEVERAL}")
    ] = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Add the reference that knows which tokens the answer needs.")
    ] = False,
    seeds: Annotated[
        Texts, typer.Option("--seeds", "--seed", help=f"Streams of questions. {SEVERAL} Default: 0.")
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option(
            "--limit",
            metavar="N",
            help=f"The first N questions of each seed, or 'all' that a task has. Default: {LIMIT}.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", help="The run that all others are tested against, by its label. Default: duet, where it runs."
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Questions per batch. Default: 40.")] = None,
    chunk_frames: ChunkFrames = None,
    still_frames: StillFrames = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Processes; default: one per GPU, without one as many as cores."),
    ] = None,
    timing_rounds: Annotated[
        int, typer.Option("--timing-rounds", min=0, help="Rounds of the prefill timing; 0 leaves it out.")
    ] = 20,
    experiment: Annotated[
        Path | None,
        typer.Option(
            "--experiment", help="An experiment file in place of all options above but --workers and --timing-rounds."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="What the result is called. Default: eval, or the experiment file's name."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for TASK/experiments and TASK/results.")] = OUT,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop an unfinished or finished result of that name and begin anew.")
    ] = False,
    device: Device = None,
    json_: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure accuracy, tokens, FLOPs, KV bytes and prefill time of methods and budgets, beside the full model, on the
    same questions.

    All GPUs of the machine are used. Start the same command again after a kill and it continues where it stopped.
    """
    with friendly(debug, json_, GOES_ON):
        from duet_vlm.cli.eval_jobs import JobOptions, check_tasks, run_job, tell_progress
        from duet_vlm.evaluation.experiment import read

        plain_name("--name", name)
        settings: dict[str, Any] = {
            "--tasks": tasks,
            "--model": model,
            "--methods": methods,
            "--budgets": budgets,
            "--presets": presets,
        }
        settings |= {"--oracle": oracle, "--seeds": seeds, "--limit": limit, "--against": against, "--batch": batch}
        settings |= {"--chunk-frames": chunk_frames, "--still-frames": still_frames}
        if experiment is not None:
            given = [option for option, value in settings.items() if value not in (None, []) and value is not False]
            if given:
                raise ValueError(
                    f"--experiment {experiment} says what is asked: leave out {', '.join(given)}, or change a copy of the file"
                )
            jobs = [read(experiment)]
        else:
            cells, numbers, questions = _cells(methods, budgets, presets, oracle), seeds_of(seeds), limit_of(limit)
            names = [str(path) for path in several_paths(list(map(Path, tasks or [])))]
            chunk_settings = _pieces(chunk_frames, still_frames, names or ["tiny"])
            jobs = [
                _job(task, model, cells, numbers, questions, against, batch, chunk_settings)
                for task in names or ["tiny"]
            ]
        for job in jobs:
            check_model(job.model)
        check_tasks(jobs)
        wanted = JobOptions.checked(out, restart, workers, timing_rounds, device, json_)
        title = name or ("eval" if experiment is None else experiment.stem)
        results = [run_job(job, title, wanted) for job in jobs]
        said = [tell_progress(file, result) for file, result in results if result is not None]
        if json_:
            print(json.dumps({"results": said}))


def _job(
    task: str,
    model: str | None,
    cells: tuple[dict[str, Any], ...],
    seeds: tuple[int, ...],
    limit: int | None,
    against: str | None,
    batch: int | None,
    chunk_settings: dict[str, Any],
) -> Experiment:
    from duet_vlm.evaluation.experiment import AGAINST, Experiment
    from duet_vlm.evaluation.tasks import usual_model

    job = Experiment(
        task, cells, model or usual_model(task), seeds, limit, batch or 40, against or AGAINST, **chunk_settings
    )
    if against is not None:
        job.check_against()
    return job


def _pieces(chunk_frames: int | None, still_frames: float | None, names: list[str]) -> dict[str, Any]:
    from duet_vlm.evaluation.tasks import task

    if chunk_frames is None and still_frames is None:
        return {}
    without = [name for name in names if not task(name).clips]
    return pieces_of(
        chunk_frames, still_frames, not without, f"take tasks with clips in place of --tasks {','.join(without)}"
    )


def _cells(methods: Texts, budgets: Texts, presets: Texts, oracle: bool) -> tuple[dict[str, Any], ...]:
    from duet_vlm.evaluation.experiment import ORACLE, REFERENCES, cells_of

    text = METHODS if methods is None and presets is None else ",".join(several(methods))
    wanted, published, named = budgets_of(budgets or [BUDGETS]), several(presets), cells_of(text) if text else []
    if published:
        chosen("presets", "name", published)
    cells: list[dict[str, Any]] = []
    for name, pairs in named:
        method, own, kept = method_of(name, *REFERENCES)
        check_settings(method, merged(kept, settings_of(pairs)))
        cells.append(
            {
                "method": method,
                "budgets": wanted if own is None or budgets else [own],
                "settings": merged(kept, settings_of(pairs)),
            }
        )
    cells += [{"preset": preset} for preset in published]
    return (*cells, {"method": ORACLE, "budgets": wanted}) if oracle else tuple(cells)


def seeds_of(values: Texts) -> tuple[int, ...]:
    for text in (texts := several(values) or ["0"]):
        if not text.isdecimal():
            raise ValueError(f"--seeds {text}: give integers, 0 or more")
    return tuple(map(int, texts))


def limit_of(text: str | None) -> int | None:
    """Questions per seed; None for all that there are."""
    if text is None or text == "all":
        return LIMIT if text is None else None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--limit {text}: give a whole number, at least 1, or 'all'")
    return int(text)
