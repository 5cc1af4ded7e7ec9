"""Prompts of a file or a folder, read and checked before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from duet_vlm.evaluation.tasks import TaskQuestion, task
from duet_vlm.inputs.images import open_image
from duet_vlm.utils.contents import digest_of

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Prompts:
    """``names`` and the texts of all prompts; ``open`` makes the question of one, and raises a ValueError where its
    picture cannot be read. ``mark`` changes with what they and their files hold; ``clips``: some show one."""

    names: tuple[str, ...]
    texts: tuple[str, ...]
    open: Callable[[int], TaskQuestion]
    mark: str
    clips: bool = False


def prompts(data: str, prompt: str | None) -> Prompts:
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

        return Prompts(names, (prompt,) * len(files), about, digest_of([names, prompt], files))
    if path.suffix != ".jsonl" or not path.is_file():
        raise ValueError(
            f"--data {data}: give a folder of pictures or a .jsonl file with image (or video) and question in each line"
        )
    if prompt:
        raise ValueError(f"--prompt: the questions stand in {data}, leave it out")
    file_task = task(str(path))
    # read without complaint just now
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    names = tuple(str(line.get("id", number)) for number, line in enumerate(lines))
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--data {data}: the id {twice[0]!r} stands in two lines")
    mark = digest_of([names, file_task.digest(len(names))], [])
    return Prompts(
        names, tuple(line["question"] for line in lines), lambda i: file_task.ask(0, i), mark, file_task.clips
    )
