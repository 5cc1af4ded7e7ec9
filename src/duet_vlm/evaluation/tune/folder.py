"""A folder of images and videos as a task: every file with every prompt, or with those of a text file of its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from duet_vlm.evaluation.tasks import Task, TaskQuestion
from duet_vlm.inputs.images import open_image
from duet_vlm.inputs.video import decode
from duet_vlm.utils.contents import digest_of

PICTURES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
CLIPS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm"})


def folder_task(folder: Path, prompts: Sequence[str], frames: int | None = None) -> Task:
    """Each line of ``photo.txt`` beside ``photo.jpg`` is a question about it, or each of ``prompts`` where there is no
    such file.

    Raises
    ------
    ValueError
        No images or videos in the folder, or no prompt for one of them; the file is named.
    """
    questions: list[tuple[Path, str]] = []
    for file in sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES | CLIPS):
        beside = file.with_suffix(".txt")
        try:
            own = (
                [line.strip() for line in beside.read_text(encoding="utf-8").splitlines() if line.strip()]
                if beside.is_file()
                else list(prompts)
            )
        except UnicodeDecodeError as error:
            raise ValueError(f"{beside}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from error
        if not own:
            raise ValueError(
                f"{file}: nothing to ask about it; give --prompt, or write prompts into {beside.name} beside it, one a line"
            )
        questions += [(file, prompt) for prompt in own]
    if not questions:
        raise ValueError(f"{folder}: no pictures or clips in it ({', '.join(sorted(PICTURES | CLIPS))})")

    def ask(_: int, index: int) -> TaskQuestion:
        file, prompt = questions[index]
        name = f"{file.name}/{index}"
        if file.suffix.lower() in CLIPS:
            return TaskQuestion(name, (), prompt, (), "all", videos=(decode(file, frames).frames,))
        return TaskQuestion(name, (open_image(file),), prompt, (), "all")

    def digest(count: int) -> str:
        return digest_of(
            [(file.name, prompt) for file, prompt in questions[:count]], [file for file, _ in questions[:count]]
        )

    return Task(folder.resolve().name or "folder", ask, len(questions), 32, digest=digest)
