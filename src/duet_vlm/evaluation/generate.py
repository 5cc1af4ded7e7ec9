"""Answers to many prompts, written to a file: resumable, and shared among processes without communication.

Prompts are put into batches in their order, the same however many processes there are
(:mod:`duet_vlm.evaluation.ranks`). The process that finds all of them recorded writes the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from duet_vlm import BudgetError, Handle
from duet_vlm.api.loading import LoadedModel
from duet_vlm.evaluation.journal import CONTENTS, Journal, Page, alone
from duet_vlm.evaluation.prompts import Prompts
from duet_vlm.evaluation.ranks import WorkerRank, recorded
from duet_vlm.evaluation.results import versions
from duet_vlm.evaluation.run import model_facts
from duet_vlm.evaluation.run_sample import inputs_of
from duet_vlm.evaluation.tasks import TaskQuestion

RUN = "answers"  # the only run that a page holds

Row = dict[str, Any]


def generate(
    loaded: LoadedModel,
    prompts: Prompts,
    out: Path,
    attach: Callable[[], Handle],
    *,
    batch: int,
    max_new_tokens: int,
    worker: WorkerRank,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> bool:
    """Answer the unanswered prompts of this process's share; True if ``out`` is complete then.

    Parameters
    ----------
    out : Path
        JSON lines in the order of the prompts: id, question and answer, or error where an image or the budget makes one
        impossible. Journals are kept beside it in ``OUT.parts``.
    attach : callable
        Attaches the reduction to the model.
    worker : WorkerRank
        The rank of this process.
    advance : callable
        Called with (recorded batches, all batches) of this process's share.

    Raises
    ------
    ValueError
        Journals of other prompts, another model or other settings; two processes of the same rank at once; videos for a
        model that takes none.
    """
    if prompts.clips and not loaded.takes_clips:
        raise ValueError(
            f"--data shows clips, and --model {loaded.name} takes pictures only; 'duet-vlm models' says who takes clips"
        )
    batches = {
        str(first // batch): range(first, min(first + batch, len(prompts.names)))
        for first in range(0, len(prompts.names), batch)
    }
    path = out.with_name(f"{out.name}.parts") / f"{worker.rank}.jsonl"
    with attach() as handle, torch.no_grad(), alone(path):
        method: Row = {
            "method": handle.reducer.name,
            "budget": handle.budget,
            "settings": json.loads(json.dumps(handle.reducer.settings())),
        }
        chunk_settings = {"chunk_frames": handle.chunks.chunk_frames, "still_frames": handle.chunks.still_frames}
        given = {"batch": batch, "max_new_tokens": max_new_tokens} | {
            name: value for name, value in chunk_settings.items() if value is not None
        }
        journal = Journal(
            path,
            {
                CONTENTS: prompts.mark,
                "model": model_facts(loaded),
                "reduction": method,
                "options": given,
                "versions": versions(),
            },
        )

        def work(todo: dict[str, list[str]]) -> Generator[tuple[str, Page], None, None]:
            for part in todo:
                yield (
                    part,
                    {"questions": [], "runs": {RUN: _answers(loaded, handle, prompts, batches[part], max_new_tokens)}},
                )

        pages = recorded(journal, worker, list(batches), [RUN], work, advance=advance)
    if pages is None:
        return False
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for part in batches for row in pages[part]["runs"][RUN])
    beside = out.with_name(f".{out.name}.{worker.rank}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, out)  # whoever else finds everything writes the same
    return True


def _answers(
    loaded: LoadedModel, handle: Handle, prompts: Prompts, numbers: Sequence[int], max_new_tokens: int
) -> list[Row]:
    """One row for each prompt of a batch. An impossible prompt gets its error in its row, and the others are
    answered."""
    rows: list[Row] = [{"id": prompts.names[number], "question": prompts.texts[number]} for number in numbers]
    questions: dict[int, TaskQuestion] = {}
    for i, number in enumerate(numbers):
        try:
            questions[i] = prompts.open(number)
        except (ValueError, OSError) as error:
            rows[i]["error"] = " ".join(str(error).split())
    try:
        said = dict(zip(questions, _said(loaded, handle, list(questions.values()), max_new_tokens), strict=True))
    except BudgetError:  # of one of them; the others are answered alone
        said = {}
        for i, question in questions.items():
            try:
                (said[i],) = _said(loaded, handle, [question], max_new_tokens)
            except BudgetError as error:
                rows[i]["error"] = str(error)
    for i, answer in said.items():
        rows[i]["answer"] = answer
    return rows


def _said(loaded: LoadedModel, handle: Handle, questions: list[TaskQuestion], max_new_tokens: int) -> list[str]:
    if not questions:
        return []
    inputs = inputs_of(loaded, questions)
    made = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return [
        text.strip()
        for text in loaded.processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ]
