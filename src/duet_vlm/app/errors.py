"""Errors as sentences for the page."""

from __future__ import annotations

from pathlib import Path

EXPECTED = (ValueError, TypeError, RuntimeError, OSError, ImportError, MemoryError)


def sentence(error: BaseException, file: Path | None = None) -> str:
    """The message of an error in one line, without the words of the command line and without the folder that an upload
    lies in."""
    words = " ".join(str(error).split()) or type(error).__name__
    if file is not None:
        for option in ("--image ", "--video ", ""):
            words = words.replace(f"{option}{file}", file.name)
    words = words.replace("--prompt holds", "the question holds").replace("--video: ", "")
    if "out of memory" in words.lower() or isinstance(error, MemoryError):
        return "the model ran out of memory: take a smaller picture, fewer tokens or a shorter answer"
    return words if isinstance(error, EXPECTED) else f"unexpected {type(error).__name__}: {words}"
