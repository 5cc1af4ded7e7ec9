"""Sealed streams: questions that judge a commit and that nobody could look at, or choose, before it was made.

The seed of the questions is made of the commit's hash. A list beside the results (``lab/comparison/streams.json``) names
each stream that was opened, so that none judges twice.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any


class StreamError(ValueError):
    """A stream that may not be opened."""


def seed_of(commit: str) -> int:
    """The seed that a commit's hash makes: its first six digits."""
    return int(commit[:6], 16)


def opened(streams: Path, result: str, judged: tuple[str, ...] = ("src", "lab/src", "lab/studies")) -> int:
    """The seed of the questions behind a result; its stream is opened and listed if it was not yet.

    Parameters
    ----------
    streams : Path
        The list, in a clone of the repository.
    result : str
        The result file, by its path from the list's folder; a run that was broken off goes on with the stream it had.
    judged : tuple of str
        Folders of the clone that must be as committed.

    Raises
    ------
    StreamError
        Changes that are not committed, or another result that the commit's stream judged on the same task.
    """
    known: list[dict[str, Any]] = json.loads(streams.read_text()) if streams.exists() else []
    for stream in known:
        if stream["result"] == result:
            return int(stream["seed"])
    if changed := _git(streams, "status", "--porcelain", "--", *(f":/{folder}" for folder in judged)):
        raise StreamError(
            f"commit first, the stream is made of the commit that is judged; changed: {changed.split()[1]}"
        )
    commit = _git(streams, "rev-parse", "HEAD")
    task = result.partition("/")[0]
    for stream in known:
        if stream["commit"] == commit and stream["result"].startswith(f"{task}/"):
            raise StreamError(
                f"{stream['result']} has opened the stream of {commit[:8]} for {task}: commit what is new first"
            )
    known.append(
        {
            "result": result,
            "commit": commit,
            "seed": seed_of(commit),
            "date": _git(streams, "log", "-1", "--format=%cs"),
        }
    )
    streams.write_text(json.dumps(known, indent=1) + "\n")
    return seed_of(commit)


def _git(streams: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(streams.parent), *words], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()
