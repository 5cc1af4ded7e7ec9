"""Answers to many prompts, written to a file: resumable, and shared among processes without communication.

Prompts are put into batches in their order, the same however many processes there are
(:mod:`duet_vlm.evaluation.distributed`). The process that finds all of them recorded writes the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import duet_vlm
from duet_vlm import BudgetError, Handle
from duet_vlm.api.loading import LoadedModel
from duet_vlm.evaluation.distributed import WorkerRank, recorded
from duet_vlm.evaluation.journal import CONTENTS, Journal, Page, alone
from duet_vlm.evaluation.run import model_facts
from duet_vlm.evaluation.run_sample import inputs_of
from duet_vlm.evaluation.tasks import TaskQuestion, task
from duet_vlm.inputs.images import open_image
from duet_vlm.utils.contents import digest_of

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

RUN = "answers"  # the only run that a page holds

Row = dict[str, Any]


@dataclass(frozen=True)
class PromptFile:
    """Prompts and their images.

    Attributes
    ----------
    names, texts : tuple of str
        Names and texts of all prompts.
    open : callable
        Makes the question of one prompt; raises a ValueError where its image cannot be read.
    mark : str
        Digest of the prompts and their files.
    clips : bool
        Some prompts show a video.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    open: Callable[[int], TaskQuestion]
    mark: str
    clips: bool = False


def prompts(data: str, prompt: str | None) -> PromptFile:
    """The prompts of a JSON-lines file (image or video, question), or ``prompt`` about every picture of a folder.

    Raises
    ------
    ValueError
        No such file or folder, nothing in it, a broken line, or a prompt too many or too few.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        if not prompt:
            raise ValueError(f"--data {data}: a folder of pictures needs --prompt, the question about each of them")
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        if not files:
            raise ValueError(f"--data {data}: no pictures in this folder ({', '.join(sorted(PICTURES))})")
        names = tuple(file.name for file in files)

        def about(number: int) -> TaskQuestion:
            return TaskQuestion(names[number], (open_image(files[number]),), prompt, (), "all")

        return PromptFile(names, (prompt,) * len(files), about, digest_of([names, prompt], files))
    if path.suffix != ".jsonl" or not path.is_file():
        raise ValueError(f"--data {data}: give a folder of pictures or a .jsonl file with image (or video) and question in each line")
    if prompt:
        raise ValueError(f"--prompt: the questions stand in {data}, leave it out")
    question_task = task(str(path))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]  # read without complaint just now
    names = tuple(str(line.get("id", number)) for number, line in enumerate(lines))
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--data {data}: the id {twice[0]!r} stands in two lines")
    mark = digest_of([names, question_task.digest(len(names))], [])
    return PromptFile(names, tuple(line["question"] for line in lines), lambda i: question_task.ask(0, i), mark, question_task.clips)


def generate(
    loaded: LoadedModel,
    prompt_file: PromptFile,
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
    if prompt_file.clips and not loaded.takes_clips:
        raise ValueError(f"--data shows clips, and --model {loaded.name} takes pictures only; 'duet-vlm models' says who takes clips")
    batches = {str(first // batch): range(first, min(first + batch, len(prompt_file.names))) for first in range(0, len(prompt_file.names), batch)}
    path = out.with_name(f"{out.name}.parts") / f"{worker.rank}.jsonl"
    with attach() as handle, torch.no_grad(), alone(path):
        method: Row = {"method": handle.reducer.name, "budget": handle.budget, "settings": json.loads(json.dumps(handle.reducer.settings()))}
        versions = {"duet_vlm": duet_vlm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        pieces = {"chunk_frames": handle.chunks.chunk_frames, "still_frames": handle.chunks.still_frames}
        options = {"batch": batch, "max_new_tokens": max_new_tokens} | {name: value for name, value in pieces.items() if value is not None}
        journal = Journal(
            path,
            {
                CONTENTS: prompt_file.mark,
                "model": model_facts(loaded),
                "reduction": method,
                "options": options,
                "versions": versions,
            },
        )

        def work(todo: dict[str, list[str]]) -> Generator[tuple[str, Page], None, None]:
            for part in todo:
                yield part, {"questions": [], "runs": {RUN: _answers(loaded, handle, prompt_file, batches[part], max_new_tokens)}}

        pages = recorded(journal, worker, list(batches), [RUN], work, advance=advance)
    if pages is None:
        return False
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for part in batches for row in pages[part]["runs"][RUN])
    unfinished = out.with_name(f".{out.name}.{worker.rank}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, out)  # any other process that is complete writes the same
    return True


def _answers(loaded: LoadedModel, handle: Handle, prompt_file: PromptFile, numbers: Sequence[int], max_new_tokens: int) -> list[Row]:
    """One row for each prompt of a batch. An impossible prompt gets its error in its row, and the others are
    answered."""
    rows: list[Row] = [{"id": prompt_file.names[number], "question": prompt_file.texts[number]} for number in numbers]
    questions: dict[int, TaskQuestion] = {}
    for i, number in enumerate(numbers):
        try:
            questions[i] = prompt_file.open(number)
        except (ValueError, OSError) as error:
            rows[i]["error"] = " ".join(str(error).split())
    try:
        texts = dict(zip(questions, _generated_texts(loaded, handle, list(questions.values()), max_new_tokens), strict=True))
    except BudgetError:  # of one of them; the others are answered alone
        texts = {}
        for i, question in questions.items():
            try:
                (texts[i],) = _generated_texts(loaded, handle, [question], max_new_tokens)
            except BudgetError as error:
                rows[i]["error"] = str(error)
    for i, answer in texts.items():
        rows[i]["answer"] = answer
    return rows


def _generated_texts(loaded: LoadedModel, handle: Handle, questions: list[TaskQuestion], max_new_tokens: int) -> list[str]:
    if not questions:
        return []
    inputs = inputs_of(loaded, questions, salient=getattr(handle.reducer, "text_query", None) == "salient")
    sequences = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return [text.strip() for text in loaded.processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]
