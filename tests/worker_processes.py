"""What worker processes of the tests do; a module, because they import it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from duet_vlm.evaluation.ranks import WorkerRank


class StubbornError(Exception):
    """Cannot be unpickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def clerk(folder: Path, rank: WorkerRank, place: str | None) -> None:
    """Does what its place says, after it has said its rank in a file."""
    (folder / str(rank.rank)).write_text(str(rank))
    if place == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if place == "exit":
        os._exit(3)
    if place == "fails":
        raise ValueError("no such model")
    if place == "stubborn":
        raise StubbornError("cannot", "travel")
    if place == "for ever":
        threading.Event().wait()
