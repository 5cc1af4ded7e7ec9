"""``duet-vlm drop-curve``: after which layer do visual tokens stop mattering, and which schedule follows from it?"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from duet_vlm.api.loading import check_model, config_of, depth_of
from duet_vlm.cli.errors import GOES_ON, friendly, plain_name
from duet_vlm.cli.eval import limit_of, seeds_of
from duet_vlm.cli.options import SEVERAL, AsJson, Debug, Device, budgets_of, method_of, several

if TYPE_CHECKING:
    from duet_vlm.evaluation.drop_curve import CurvePoint, DropCurve

OUT = Path("out/drop-curve")


def drop_curve(
    task: Annotated[
        str, typer.Option("--task", "--tasks", help="tiny, a task of duet-vlm-lab (tiny-chain), or a .jsonl file.")
    ] = "tiny",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A local folder, or a hub id. Default: the embedded model for the task."),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layers", help=f"Layers to measure. {SEVERAL} Default: all, or 12 spread over a deep decoder."),
    ] = None,
    asleep: Annotated[
        int | None,
        typer.Option(
            "--asleep",
            metavar="N",
            help="Also let all of them sleep for N layers and come back: do stale states serve?",
        ),
    ] = None,
    budgets: Annotated[
        list[str] | None,
        typer.Option("--budget", "--budgets", "-b", help=f"Also find the best schedule for these budgets. {SEVERAL}"),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="Whose schedule: a method that takes schedule= beside a budget.")
    ] = "duet_plus",
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, max=1, help="Accuracy that may be lost where tokens count as read.")
    ] = 0.01,
    seeds: Annotated[
        list[str] | None, typer.Option("--seeds", "--seed", help=f"Streams of questions. {SEVERAL} Default: 0.")
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option("--limit", metavar="N", help="Questions per seed, or 'all' that a task has. Default: 200."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Questions per batch.")] = 40,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Processes; default: one per GPU, without one as many as cores."),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="What the results are called.")] = "drop-curve",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for results and pictures.")] = OUT,
    restart: Annotated[bool, typer.Option("--restart", help="Drop results of that name and begin anew.")] = False,
    device: Device = None,
    json_: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure what is lost when all visual tokens are dropped before each layer, and propose schedules.

    Questions without answers are judged by the full model's own. With --budget the proposals are measured beside the
    fixed schedules, on the same questions. Start the same command again after a kill and it continues where it stopped.
    """
    with friendly(debug, json_, GOES_ON):
        plain_name("--name", name)
        method, *_ = method_of(method)
        wanted_layers, numbers, questions = _layers(layers), seeds_of(seeds), limit_of(limit)
        budgets_wanted = budgets_of(budgets) if budgets else []

        from duet_vlm.cli.eval_jobs import JobOptions, check_tasks, run_job, tell_progress
        from duet_vlm.evaluation.drop_curve import (
            DEEP,
            FULL,
            check_takes_schedules,
            contest,
            curve_of,
            drops,
            layers_of,
            proposals,
            sleeps,
            slept,
            winners,
        )
        from duet_vlm.evaluation.experiment import Experiment
        from duet_vlm.evaluation.ranks import WorkerRank
        from duet_vlm.evaluation.tasks import task as task_of
        from duet_vlm.evaluation.tasks import usual_model

        WorkerRank.here().check_alone("drop-curve")
        source = model or usual_model(task)
        task_of(task).count(questions)
        if (stated := depth_of(check_model(source))) is not None:
            given = layers_of(stated, wanted_layers)
            if asleep is not None:
                sleeps(given, stated, asleep)
        if importlib.util.find_spec("matplotlib") is None:  # said now, not after hours
            raise ImportError(
                'the picture of the curve needs matplotlib: pip install ".[eval]" in your clone of duet-vlm'
            )
        from duet_vlm.evaluation.report.plots import all_plots

        depth = config_of(source).get_text_config().num_hidden_layers
        if budgets_wanted:
            check_takes_schedules(method, depth)
        measured = layers_of(depth, wanted_layers)
        cells = drops(measured) + (() if asleep is None else sleeps(measured, depth, asleep))
        job = Experiment(task, cells, source, numbers, questions, batch, FULL)
        check_tasks([job])
        wanted = JobOptions.checked(out, restart, workers, 0, device, json_)
        file, result = run_job(job, name, wanted)
        assert result is not None  # this process is alone
        curve = curve_of(result)
        assert curve is not None  # it was just measured
        picture = file.with_suffix(".png")
        picture.write_bytes(all_plots(result)["drops"][1])
        facts: dict[str, Any] = {"file": str(file), "picture": str(picture), "curve": _facts(curve, tolerance)}
        facts["schedules"] = proposals(curve, tolerance)
        if asleep is not None:
            facts["asleep"] = [{"layers": asleep} | asdict(point) for point in slept(result)]
        if not json_:
            _show(curve, facts["schedules"], tolerance)
            if asleep is not None:
                for point in slept(result):
                    print(_woken(point, curve, asleep))
            print(f"picture: {picture}")
        if budgets_wanted:
            second = Experiment(
                task, contest(curve, method, budgets_wanted, tolerance), source, numbers, questions, batch, DEEP
            )
            file, result = run_job(second, f"{name}-schedules", wanted)
            assert result is not None  # this process is alone
            best = winners(result)
            facts |= {
                "best": {str(budget): _line(row) for budget, row in best.items()},
                "contest": tell_progress(file, result),
            }
            if not json_:
                for row in best.values():
                    print(_sentence(row))
        if json_:
            print(json.dumps(facts))


def _layers(values: list[str] | None) -> tuple[int, ...]:
    layers = several(values)
    for text in layers:
        if not text.isdecimal():
            raise ValueError(f"--layers {text}: give whole numbers with commas between")
    return tuple(map(int, layers))


def _woken(point: CurvePoint, curve: DropCurve, gap: int) -> str:
    """A line: the loss by sleeping for ``gap`` layers, beside that by dropping."""
    low, high = point.interval
    dropped = next(each.difference for each in curve.points if each.layer == point.layer)
    where = f"layers {point.layer} to {point.layer + gap - 1}" if gap > 1 else f"layer {point.layer}"
    return (
        f"asleep in {where}: {100 * point.difference:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}); "
        f"dropped there: {100 * dropped:+.1f}"
    )


def _facts(curve: DropCurve, tolerance: float) -> dict[str, Any]:
    return {
        "depth": curve.depth,
        "full": curve.full,
        "needed_until": curve.needed_until(tolerance),
        "needs": curve.needs(),
        "points": [asdict(point) for point in curve.points],
    }


def _show(curve: DropCurve, schedules: dict[str, Any], tolerance: float) -> None:
    last = curve.needed_until(tolerance)
    points = f"{100 * tolerance:g} point{'s'[: tolerance != 0.01]}"
    lost = f"within {points} of the full model's {curve.full:.3f}"
    if last == curve.depth:
        print(
            f"Visual tokens matter in all {curve.depth} layers: without them from the last measured one on, accuracy is not {lost}."
        )
    else:
        print(
            f"Visual tokens stop mattering at layer {last} of {curve.depth}: without any from there on, accuracy stays {lost}."
        )
    print("schedules that follow (layer, share of the entering tokens kept from there on):")
    for name, schedule in schedules.items():
        print(f"  {name:<10} {schedule}")


def _line(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("method", "budget", "label", "accuracy")} | {
        "schedule": row["settings"]["schedule"]
    }


def _sentence(row: dict[str, Any]) -> str:
    schedule = tuple(tuple(stage) for stage in row["settings"]["schedule"])
    return (
        f"budget {row['budget']:g}: best is '{row['label']}' ({row['accuracy']:.3f}):\n"
        f"  attach(model, {row['method']!r}, budget={row['budget']:g}, schedule={schedule})"
    )
