"""Tasks: streams of questions about pictures or clips, with short answers that can be checked.

Embedded tasks (``tiny``, and those of installed packages) draw their questions (no file, no end); any other name is the
path of a JSON-lines file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from duet_vlm.api.embedded import embedded_task, model_names, task_names
from duet_vlm.inputs.images import local, open_image
from duet_vlm.inputs.video import decode
from duet_vlm.utils import lab
from duet_vlm.utils.contents import digest_of
from duet_vlm.utils.suggest import did_you_mean


@dataclass(frozen=True)
class TaskQuestion:
    """One question. A video is its frames.

    Attributes
    ----------
    id : str
        Unique within a task.
    images : tuple of PIL.Image.Image
        Its images.
    text : str
        The question.
    answers : tuple of str
        Accepted answers; empty where there are none (then the full model's answer counts as right).
    kind : str
        Its kind, for tables.
    needed : array or None
        Mask of the visual tokens that the answer needs (None where the task does not know).
    videos : tuple of tuple of PIL.Image.Image
        Its videos.
    """

    id: str
    images: tuple[Image.Image, ...]
    text: str
    answers: tuple[str, ...]
    kind: str
    needed: np.ndarray | None = None
    videos: tuple[tuple[Image.Image, ...], ...] = ()


@dataclass(frozen=True)
class Task:
    """A stream of questions.

    Attributes
    ----------
    name : str
        Its name.
    ask : callable
        ``ask(seed, index)`` makes a question.
    size : int or None
        Questions per seed (None: without end).
    max_new_tokens : int
        Length of an answer.
    clips : bool
        Some questions show a video.
    digest : callable
        ``digest(count)``: digest of the first ``count`` questions and their files; None where questions are drawn.
    """

    name: str
    ask: Callable[[int, int], TaskQuestion]
    size: int | None
    max_new_tokens: int
    clips: bool = False
    digest: Callable[[int], str | None] = lambda count: None

    def count(self, limit: int | None) -> int:
        """Questions per seed.

        Raises
        ------
        ValueError
            If the task has no end and no limit is given.
        """
        if self.size is None and limit is None:
            raise ValueError(f"task {self.name!r} draws questions without end: give --limit a number")
        return min(x for x in (self.size, limit) if x is not None)


def usual_model(name: str) -> str:
    """The embedded model that reads what a task shows."""
    return name if name in model_names() else "tiny"


def task(name: str) -> Task:
    """A task by name, or of a JSON-lines file: one ``{"image": path or [paths], "question", "answer" or "answers",
    "kind"}`` per line. Answers and kind may be left out; ``"video"`` may stand beside or in place of the image, and
    then ``"frames"``, how many are taken of each.

    Raises
    ------
    ValueError
        Unknown name, or a file with a broken line (its number is named).
    """
    drawn = task_names()
    if name in drawn:
        return Task(name, partial(_drawn, name), None, 4, clips=embedded_task(name).clips)
    if name in lab.TASKS:
        raise ValueError(lab.how_to_install("task", name))
    path = Path(name).expanduser()
    if path.suffix != ".jsonl":
        near = did_you_mean(name, {*drawn, *lab.TASKS})
        known = f"give {', '.join(drawn)}, or the path of a .jsonl file with image, question, answer, kind"
        raise ValueError(f"unknown task {name!r}{near}: {known}")
    if not path.is_file():
        raise ValueError(f"{name}: {'is a folder' if path.is_dir() else 'no such file'}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from error
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path}: no questions in it")
    for what in ("image", "video"):
        for file in (path.parent / name for row in rows for name in row[f"{what}s"]):
            if not file.is_file():  # said now, not after hours; broken ones are found when they are opened
                raise ValueError(f"{path}: its {what} {file}: no such file")

    def digest(count: int) -> str:
        return digest_of(
            rows[:count], [path.parent / name for row in rows[:count] for name in (*row["images"], *row["videos"])]
        )

    return Task(
        path.stem,
        lambda _, index: _question(path, rows[index], index),
        len(rows),
        32,
        any(row["videos"] for row in rows),
        digest,
    )


def right(question: TaskQuestion, said: str) -> bool:
    """True if an answer is among the accepted ones."""
    return accepted(said, question.answers)


def accepted(said: str, answers: Sequence[str]) -> bool:
    """Exact match without regard to case, outer blanks and a final full stop."""
    return _plain(said) in {_plain(answer) for answer in answers}


def _plain(text: str) -> str:
    return text.strip().lower().removesuffix(".")


def _drawn(name: str, seed: int, index: int) -> TaskQuestion:
    item = embedded_task(name).sample("test", index, seed)
    videos = (item.frames,) if item.frames else ()
    return TaskQuestion(f"{seed}/{index}", item.images, item.question, (item.answer,), item.kind, item.needed, videos)


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from error
    try:
        images, videos = (_several(row.get(what, [])) for what in ("image", "video"))
        answers = _several(row.get("answers", row.get("answer", [])))
        made = {"images": images, "videos": videos, "frames": row.get("frames"), "question": row["question"]}
        made |= {"answers": list(map(_word, answers)), "kind": _word(row.get("kind", "all"))}
        if not {"image", "video"} & set(row):
            raise KeyError("image")
    except KeyError as error:
        raise ValueError(
            f"{path}, line {number}: needs image and question, or video in place of the image; {error} is missing"
        ) from error
    texts = [made["question"], made["kind"], *images, *videos, *made["answers"]]
    labelled = answers or not {"answer", "answers"} & set(row)
    empty = any(what in row and not _several(row[what]) for what in ("image", "video"))
    if empty or not labelled or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{path}, line {number}: image, question, answer and kind are texts, video too; all but question and kind may be lists, not empty ones"
        )
    if made["frames"] is not None and (type(made["frames"]) is not int or made["frames"] < 1 or not videos):
        raise ValueError(
            f"{path}, line {number}: frames {made['frames']!r}: how many are taken of each video, a whole number from 1"
        )
    for name in (*images, *videos):
        local(name, f"{path}, line {number}: ")
    return made


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _word(value: Any) -> Any:
    """Answers and kinds are compared as text, and 3 is a natural way to write one."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _question(path: Path, row: dict[str, Any], index: int) -> TaskQuestion:
    try:
        images = tuple(open_image(path.parent / name) for name in row["images"])
        videos = tuple(decode(path.parent / name, row["frames"]).frames for name in row["videos"])
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('--image ').removeprefix('--video ')}") from error
    return TaskQuestion(str(index), images, row["question"], tuple(row["answers"]), row["kind"], videos=videos)
