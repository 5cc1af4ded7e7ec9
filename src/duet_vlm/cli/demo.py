"""``duet-vlm demo``: the embedded model on its shipped images, in full and at three budgets, with time, reports and
pictures."""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from duet_vlm.api.loading import quiet
from duet_vlm.cli.errors import folder_for, friendly
from duet_vlm.cli.options import AsJson, Debug

if TYPE_CHECKING:
    from duet_vlm import Report
    from duet_vlm.profiling.timing import Ratio

BUDGETS = (0.33, 0.22, 0.11)
DRAWN = 0.22
ROUNDS = 15
FIRST = "demo.png"  # the picture to look at first


@dataclass
class DemoColumn:
    """Answers of one setting (question by question), and their cost.

    Attributes
    ----------
    name : str
        Title of the column.
    budget : int or float or None
        The budget; None for the full model.
    answers : list of str
        One answer per question.
    report : Report or None
        Its costs.
    speed_up : float
        Speed-up of the prefill.
    """

    name: str
    budget: float | None
    answers: list[str] = field(default_factory=list)
    report: Report | None = None
    speed_up: Ratio | None = None


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread: a model this small gains little from threads, and a single one makes times steadier on a busy
    machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ask(model: Any, processor: Any, inputs: Any) -> list[str]:
    """Greedy answers of a batch."""
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return [
        text.strip()
        for text in processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ]


def batches(processor: Any) -> list[tuple[Any, Any]]:
    """(picture, inputs for all its questions) of the shipped pictures."""
    from duet_vlm.evaluation import tiny

    out = []
    for item in tiny.demo_images():
        texts = [tiny.prompt(question) for question, _ in item.questions]
        out.append((item, processor(images=[item.image] * len(texts), text=texts, return_tensors="pt", padding=True)))
    return out


def answer_all(
    model: Any, processor: Any, prompts: list[tuple[Any, Any]], out: Path
) -> tuple[list[DemoColumn], list[Path]]:
    """Every question in full and at every budget; on the way one picture of the first question at all of them, and one
    per image."""
    from duet_vlm import attach, get_method
    from duet_vlm.viz import ScoreRecorder, draw, model_view, stack

    columns, files, first = [DemoColumn("full", None)], [], []
    for _, inputs in prompts:
        columns[0].answers += ask(model, processor, inputs)
    for budget in BUDGETS:
        column, watched = DemoColumn(f"{budget:.0%}", budget), ScoreRecorder(get_method("duet")())
        with attach(model, watched.reducer, budget=budget) as handle:
            for item, inputs in prompts:
                said, row = ask(model, processor, inputs), len(column.answers)
                column.answers += said
                trace, tokens = handle.trace[0][0], handle.report().measured_mean
                question, full = item.questions[0][0], columns[0].answers[row]
                told = "the same answer" if said[0] == full else "another answer"
                lines = [question, f"full model: {full}", f"reduced: {said[0]}  ({told})"]
                title, picture = (
                    f"duet at {budget:.0%}: {tokens:.1f} of {trace.span.tokens} tokens per layer",
                    inputs["pixel_values"][0],
                )
                if row == 0:  # of a batch, of which the scores would be those of the first question
                    scores = watched.of(trace, 0)
                    first.append(
                        draw(model_view(item.image, picture, processor), trace, title=title, lines=lines, scores=scores)
                    )
                if budget == DRAWN:
                    files.append(out / f"{Path(item.name).stem}.png")
                    draw(model_view(item.image, picture, processor), trace, title=title, lines=lines).save(files[-1])
        columns.append(column)
    stack(first).save(out / FIRST)
    return columns, [out / FIRST, *files]


def time_all(model: Any, columns: list[DemoColumn], inputs: Any) -> dict[str, float]:
    """Median seconds of a prefill, full and reduced in turns, each on its own copy of the model; fills in speed-ups and
    reports."""
    import torch

    from duet_vlm import attach
    from duet_vlm.profiling.timing import ratio, time_paired

    copies = {column.name: copy.deepcopy(model) for column in columns}
    handles = [
        attach(copies[column.name], "duet", budget=column.budget) for column in columns if column.budget is not None
    ]

    def prefill(name: str) -> Callable[[], Any]:
        return lambda: copies[name](**inputs, logits_to_keep=1)

    with torch.inference_mode():
        timings = time_paired({name: prefill(name) for name in copies}, repeats=ROUNDS)
    for column, handle in zip(columns[1:], handles, strict=True):
        column.report = handle.report()
        handle.detach()
        column.speed_up = ratio(timings["full"], timings[column.name])
    return {name: timing.median for name, timing in timings.items()}


def agreement(column: DemoColumn, full: DemoColumn) -> int:
    return sum(a == b for a, b in zip(column.answers, full.answers, strict=True))


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")] = Path("out/demo"),
    json_: AsJson = False,
    debug: Debug = False,
) -> None:
    """Answer 20 questions with the embedded model, in full and at 33 / 22 / 11 % of the visual tokens; compare answers,
    cost and time."""
    with friendly(debug, json_):
        start = time.perf_counter()
        folder_for("--out", out)
        from duet_vlm.evaluation import tiny

        with quiet(), one_thread():
            model, processor = tiny.load()
            prompts = batches(processor)
            columns, files = answer_all(model, processor, prompts, out)
            item = prompts[0][0]
            one = processor(images=item.image, text=tiny.prompt(item.questions[0][0]), return_tensors="pt")
            seconds = time_all(model, columns, one)
        pairs = [(item.name, question, true) for item, _ in prompts for question, true in item.questions]
        if json_:
            print(json.dumps(plain(columns, pairs, seconds, files)))
        else:
            show(columns, pairs, seconds, files)
            print(f"\nfinished in {time.perf_counter() - start:.0f} s")


def plain(
    columns: list[DemoColumn], pairs: list[tuple[str, str, str]], seconds: dict[str, float], files: list[Path]
) -> dict[str, Any]:
    """The same as JSON values."""
    return {
        "questions": [{"image": name, "question": question, "answer": true} for name, question, true in pairs],
        "columns": [
            {
                "name": column.name,
                "budget": column.budget,
                "answers": column.answers,
                "agree_with_full": agreement(column, columns[0]),
                "right": sum(a == true for a, (_, _, true) in zip(column.answers, pairs, strict=True)),
                "prefill_seconds": seconds[column.name],
                "speed_up": None if column.speed_up is None else vars(column.speed_up),
                "report": None if column.report is None else json.loads(column.report.to_json()),
            }
            for column in columns
        ],
        "pictures": [str(file) for file in files],
    }


def show(
    columns: list[DemoColumn], pairs: list[tuple[str, str, str]], seconds: dict[str, float], files: list[Path]
) -> None:
    """One table, and where the pictures are."""
    console, full = Console(highlight=False), columns[0]
    console.print(
        f"The embedded tiny VLM answers {len(pairs)} questions: in full, then with DUET at three shares of the visual tokens\n"
    )
    table = Table("question", "truth", *(c.name for c in columns), box=None, pad_edge=False)
    last = ""
    for number, (name, question, true) in enumerate(pairs):
        if name != last:
            table.add_row(f"[bold]{name}[/bold]")
        cells = [_cell(column.answers[number], full.answers[number], true) for column in columns]
        table.add_row(question, true, *cells)
        last = name
    table.add_section()
    table.add_row("[bold]of all[/bold]")
    for what, cell in _facts(pairs, full, seconds):
        table.add_row(what, "", *map(cell, columns))
    console.print(table)
    console.print("\n[yellow]*[/yellow] differs from the full model   [red]x[/red] is not the true answer")
    console.print(
        f"time: prefill of the first question, pixels to first token, median of {ROUNDS} rounds in turns, one CPU thread, and the ratio of these "
        "medians; the vision tower costs nearly the same at every budget, and it is a large part of a model this small"
    )
    console.print(
        f"\nlook at first: {files[0]} (what was kept, merged and dropped, and why)\nmore: {', '.join(map(str, files[1:]))}",
        soft_wrap=True,
    )


def _facts(
    pairs: list[tuple[str, str, str]], full: DemoColumn, seconds: dict[str, float]
) -> list[tuple[str, Callable[[DemoColumn], str]]]:
    """The lines below the questions."""

    def right(column: DemoColumn) -> str:
        return str(sum(a == true for a, (_, _, true) in zip(column.answers, pairs, strict=True)))

    def reported(read: Callable[[Any], str], whole: str) -> Callable[[DemoColumn], str]:
        return lambda column: whole if column.report is None else read(column.report)

    return [
        (f"right, of {len(pairs)}", right),
        ("as the full model says", lambda column: str(agreement(column, full))),
        ("visual tokens per layer", reported(lambda report: f"{report.measured_mean:.0f}", "256")),
        ("FLOPs", reported(lambda report: f"{report.observed.flops / report.full.flops:.0%}", "100%")),
        ("KV cache", reported(lambda report: f"{report.observed.kv_bytes / report.full.kv_bytes:.0%}", "100%")),
        ("ms to the first token", lambda column: f"{seconds[column.name] * 1e3:.1f}"),
        ("speed-up", lambda column: "1" if column is full else f"{seconds[full.name] / seconds[column.name]:.2f}x"),
    ]


def _cell(said: str, full: str, true: str) -> str:
    marks = ("[yellow]*[/yellow]" if said != full else "") + ("[red]x[/red]" if said != true else "")
    return f"{said} {marks}" if marks else said
