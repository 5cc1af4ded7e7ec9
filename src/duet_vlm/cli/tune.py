"""``duet-vlm tune``: which method and budget for this model and these questions."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from duet_vlm.api.catalogue import check_settings
from duet_vlm.cli.errors import GOES_ON, folder_for, friendly, plain_name
from duet_vlm.cli.options import SEVERAL, AsJson, Debug, Device, budgets_of, method_of, settings_of, several
from duet_vlm.evaluation.tune import BUDGETS, METHODS
from duet_vlm.utils.field_types import merged

if TYPE_CHECKING:
    from duet_vlm.api.loading import LoadedModel
    from duet_vlm.evaluation.tasks import Task

LIMIT = 400  # questions of a task without end
KEEP = 0.98
SHOWN = 16  # candidates on the screen, those that were asked most first
SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGT]?)i?B?", re.IGNORECASE)

Texts = list[str] | None


def tune(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A .jsonl file, a folder of pictures and clips, tiny, or a task of duet-vlm-lab (tiny-chain).",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="'tiny', a local folder, or a hub id. Default: the task's, else tiny."),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            "--keep",
            help=f"Share of the full model's right answers to keep, with 95 %. Default: {KEEP}, if no other goal.",
        ),
    ] = None,
    speedup: Annotated[
        float | None, typer.Option("--speedup", help="Times faster to the first token, measured, at least.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Room for weights and one prompt (24GB), predicted.")
    ] = None,
    prompt: Annotated[
        Texts,
        typer.Option(
            "--prompt",
            "-p",
            help="Asked about every file of a folder that has no text file beside it. Several: the option again.",
        ),
    ] = None,
    methods: Annotated[
        Texts,
        typer.Option(
            "--methods",
            "--method",
            help=f"Settings in brackets: duet[options.text_query=last]; or ./mine.py. {SEVERAL} Default: {','.join(METHODS)}.",
        ),
    ] = None,
    budgets: Annotated[
        Texts, typer.Option("--budgets", "--budget", "-b", help=f"{SEVERAL} Default: {','.join(map(str, BUDGETS))}.")
    ] = None,
    schedules: Annotated[
        Texts,
        typer.Option(
            "--schedules", help=f"Drops inside the decoder: own, paper, deep. {SEVERAL} Default: own, each method's."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help=f"At most N questions. Default: all; {LIMIT} where they have no end."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Stream of questions, where they are drawn.")] = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Questions at a time.")] = 16,
    rounds: Annotated[int, typer.Option("--timing-rounds", min=3, help="Rounds of the timing.")] = 7,
    name: Annotated[
        str | None, typer.Option("--name", help="Folder of the result within --out. Default: the data's name.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for NAME/duet.json, result.json and pareto.png.")
    ] = Path("out/tune"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost and stop.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop what an earlier call of that name has answered.")
    ] = False,
    device: Device = None,
    json_: AsJson = False,
    debug: Debug = False,
) -> None:
    """Find the cheapest method and budget that keep a model's answers, on your questions. Labels are optional.

    Without labels the full model's own answers are held to be right. Start the same command again after a kill and it
    continues where it stopped.
    """
    with friendly(debug, json_, GOES_ON):
        plain_name("--name", name)
        _check_extras()
        from duet_vlm.api.loading import check_model, load, quiet
        from duet_vlm.evaluation.experiment import cells_of
        from duet_vlm.evaluation.ranks import WorkerRank
        from duet_vlm.evaluation.tasks import usual_model
        from duet_vlm.evaluation.tune.binomial import split
        from duet_vlm.evaluation.tune.goal import Goal

        WorkerRank.here().check_alone("tune")
        size = None if memory is None else size_of(memory)
        goal = Goal(KEEP if keep is None and speedup is None and size is None else keep, speedup, size)
        cells = cells_of(",".join(several(methods) or METHODS))
        named = [method_of(each) + (settings_of(pairs),) for each, pairs in cells]
        wanted = [(method, merged(kept, own)) for method, _, kept, own in named]
        for method, settings in wanted if methods else ():  # what is searched unless told otherwise is right
            check_settings(method, settings)
        amounts = budgets_of(budgets) or BUDGETS
        chosen_task = task_of(data, prompt)
        check_model(model or usual_model(chosen_task.name))
        count = chosen_task.count(limit if limit is not None or chosen_task.size is not None else LIMIT)
        split(count, goal.keep)  # too few questions: said before a model is loaded
        folder = folder_for("--out", out / (name or chosen_task.name))
        from duet_vlm.evaluation.tune.candidates import candidates

        with quiet():
            loaded = load(model or usual_model(chosen_task.name), device)
        runs = candidates(wanted, amounts, several(schedules) or ["own"], loaded.model)
        result = _searched(loaded, chosen_task, seed, count, runs, goal, batch, rounds, folder, restart, dry_run)
        if result is None:
            if json_:
                print(json.dumps({"chosen": None, "dry_run": True}))
            return
        _write(result, folder, json_, model or usual_model(chosen_task.name), bool(chosen_task.ask(seed, 0).videos))


def task_of(data: str, prompts: Texts) -> Task:
    """The questions: a task by its name, JSON lines, or a folder."""
    from duet_vlm.evaluation.tasks import task
    from duet_vlm.evaluation.tune.folder import folder_task

    path = Path(data).expanduser()
    if path.is_dir():
        return folder_task(path, prompts or [])
    if prompts:
        raise ValueError(f"--prompt: {data} brings its questions; prompts are for a folder of pictures")
    return task(data)


def size_of(text: str) -> float:
    """``24GB`` as bytes, in steps of a thousand as data sheets count."""
    match = SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"--memory {text}: write a size such as 24GB or 800MB")
    return float(match["number"]) * 1000 ** " KMGT".index(match["unit"].upper() or " ")


def _check_extras() -> None:
    missing = [name for name in ("scipy", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'tune needs {" and ".join(missing)}: pip install ".[eval]" in your clone of duet-vlm')


def _searched(
    loaded: LoadedModel,
    chosen_task: Task,
    seed: int,
    count: int,
    runs: Any,
    goal: Any,
    batch: int,
    rounds: int,
    folder: Path,
    restart: bool,
    dry_run: bool,
) -> dict[str, Any] | None:
    """The search, with its journal and a bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from duet_vlm.evaluation.journal import CONTENTS, Journal, alone
    from duet_vlm.evaluation.results import versions
    from duet_vlm.evaluation.run import model_facts
    from duet_vlm.evaluation.source import source
    from duet_vlm.evaluation.tune.answers import AnswerSource
    from duet_vlm.evaluation.tune.search import Preview, search

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("answers"),
        TimeElapsedColumn(),
    )
    journal = folder / "journal.jsonl"
    with alone(journal), Progress(*columns, console=console) as progress:
        if restart:
            journal.unlink(missing_ok=True)
        first = chosen_task.ask(seed, 0)
        questions = {
            "task": chosen_task.name,
            "seed": seed,
            "count": count,
            "batch": batch,
            "first": [first.id, first.text],
        }
        subject: dict[str, Any] = {
            "questions": questions,
            "model": model_facts(loaded),
            "versions": versions(),
            "source code": source().files,
        }
        if (contents := chosen_task.digest(count)) is not None:
            subject[CONTENTS] = contents
        bar = progress.add_task("the full model", total=None)

        def preview(cost: Preview) -> bool:
            progress.update(bar, total=cost.answers)
            field = "1 candidate" if len(runs) == 1 else f"{len(runs)} candidates"
            said = f"{field}, {count} questions: at most {cost.answers:,} answers, {_span(cost.seconds)} at the full model's pace, and the timing"
            console.print(f"goal: {goal.words()}\n{said}; what is answered already costs nothing", highlight=False)
            return not dry_run

        asker = AnswerSource(
            loaded, chosen_task, seed, batch, Journal(journal, subject), lambda answers: progress.advance(bar, answers)
        )
        return search(
            asker, count, runs, goal, rounds, preview, lambda text: progress.update(bar, description=text[:40])
        )


def _span(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _write(result: dict[str, Any], folder: Path, as_json: bool, model: str, clips: bool) -> None:
    """Write the files and show the result."""
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Column, Table

    from duet_vlm.evaluation.console import console
    from duet_vlm.evaluation.results import save
    from duet_vlm.evaluation.tune.pareto_plot import pareto
    from duet_vlm.evaluation.tune.summary import chosen_row, python_line, setting_file, shell_line, verdict

    row, setting = chosen_row(result), folder / "duet.json"
    lines = {} if row is None else {"python": python_line(row), "shell": shell_line(row, model, clips)}
    result |= {"verdict": verdict(result), "use": lines}
    save(folder / "result.json", result)
    (folder / "pareto.png").write_bytes(pareto(result))
    setting.unlink(missing_ok=True)  # of an earlier search
    if row is not None:
        save(setting, setting_file(result))
    if as_json:
        print(json.dumps({"folder": str(folder)} | result))
        return
    screen = console(100)
    table = Table(
        Column("candidate", overflow="fold"), "ms", "kept", "asked", "what became of it", box=SIMPLE, pad_edge=False
    )
    num_asked = {each["id"]: each["choosing"]["asked"] + each["testing"]["asked"] for each in result["candidates"]}
    rows = sorted(
        result["candidates"],
        key=lambda each: (each["id"] != result["chosen"], -num_asked[each["id"]], each["ms"] or 1e9),
    )
    for each in rows[:SHOWN]:
        kept = "-" if each["kept"] is None else f"{each['kept']:.1%}"
        told = escape(each["reason"]) or "[bold]chosen[/bold]"
        table.add_row(
            escape(each["id"]), f"{each['ms']:.4g}" if each["ms"] else "-", kept, str(num_asked[each["id"]]), told
        )
    screen.print(table)
    if len(rows) > SHOWN:
        screen.print(
            f"{len(rows) - SHOWN} more left earlier; {folder / 'result.json'} has all of them\n",
            soft_wrap=True,
            markup=False,
        )
    screen.print(result["verdict"], soft_wrap=True, markup=False)
    for lost in result["lost"]:
        said = f"  lost: {lost['question']!r}: the full model says {lost['full']!r}, this one {lost['reduced']!r}"
        screen.print(said, soft_wrap=True, markup=False)
    if row is not None:
        use = f'\nPython: {lines["python"]}\n    or: handle = duet_vlm.attach(model, "{setting}")\nshell:  {lines["shell"]}'
        screen.print(use, soft_wrap=True, markup=False)
    files = [folder / "result.json", folder / "pareto.png", *([] if row is None else [setting])]
    screen.print(f"written: {', '.join(map(str, files))}", soft_wrap=True, markup=False)
