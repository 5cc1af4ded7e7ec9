"""Uploads of the page: a picture or a clip, opened with the limits of the command line."""

from __future__ import annotations

import mimetypes
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from duet_vlm.api.loading import LoadedModel
from duet_vlm.inputs.images import open_image
from duet_vlm.inputs.video import VideoFrames, decode

MOST_MB = 100  # of an upload
LONGEST_QUESTION = 4000  # letters


@dataclass(frozen=True)
class Uploads:
    """The subject of a question: one picture, or one clip."""

    pictures: tuple[Image.Image, ...]
    clips: tuple[VideoFrames, ...]

    @property
    def preview(self) -> list[Image.Image]:
        """The picture, or the frames that are taken of the clip."""
        return [*self.pictures, *(frame for clip in self.clips for frame in clip.frames)]


def open_uploads(path: Path | None, loaded: LoadedModel) -> Uploads:
    """The file as the model is shown it.

    Raises
    ------
    ValueError
        No file, one that cannot be read or is too large, or a clip for a model that takes none.
    """
    if path is None:
        raise ValueError("nothing to look at: drop a picture or a clip first")
    if path.is_file() and path.stat().st_size > MOST_MB * 1_000_000:
        raise ValueError(
            f"{path.name}: {path.stat().st_size / 1e6:.0f} MB; at most {MOST_MB} MB are taken. Make it smaller first"
        )
    if not is_clip(path):
        return Uploads((open_image(path),), ())
    if not loaded.takes_clips:
        raise ValueError(
            f"{path.name}: {loaded.name} takes pictures only, drop one, or start the page with a model that takes clips"
        )
    return Uploads((), (decode(path, loaded.frames),))


def is_clip(path: Path) -> bool:
    """True if a file's name says that it is a clip; all else is read as a picture."""
    return (mimetypes.guess_type(path.name)[0] or "").startswith("video/") or path.suffix.lower() in (
        ".mkv",
        ".webm",
        ".m4v",
    )


def check_question(question: str | None) -> str:
    """The question without blanks around it.

    Raises
    ------
    ValueError
        There is none, or it is too long.
    """
    stripped = (question or "").strip()
    if not stripped:
        raise ValueError("no question: write what you want to know about the picture")
    if len(stripped) > LONGEST_QUESTION:
        raise ValueError(f"the question has {len(stripped)} letters; at most {LONGEST_QUESTION} are taken")
    return stripped
