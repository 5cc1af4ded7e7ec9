"""What worker processes of the tests do; a module, because they import it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import threading
from collections.abc import Callable

from duet_vlm.evaluation.ranks import WorkerRank


class StubbornError(Exception):
    """Cannot be unpickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def clerk(rank: WorkerRank, place: str | None, tell: Callable[[int], None]) -> None:
    """Does what its place says, after it has recorded as many parts as its number."""
    tell(rank.rank + 1)
    if place == "blocked":
        tell(10 * (signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])))
    if place == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if place == "exit":
        os._exit(3)
    if place == "fails":
        raise ValueError("no such model")
    if place == "stubborn":
        raise StubbornError("cannot", "travel")
    if place == "half":  # four bytes say how long the message is, of which less follows
        pipe = multiprocessing.current_process()._args[0]
        os.write(pipe.fileno(), struct.pack("!i", 1000) + b"the beginning")
        os.kill(os.getpid(), signal.SIGKILL)
    if place == "for ever":
        threading.Event().wait()
