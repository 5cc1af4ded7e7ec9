"""What worker processes of the tests do; a module, because they import it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import threading
from collections.abc import Callable
from typing import Any


class StubbornError(Exception):
    """Cannot be unpickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def clerk(place: str | None) -> Callable[[Any], Any]:
    """Squares numbers, and fails as it is told to."""
    if place == "fails at once":
        raise ValueError("no such model")
    if place == "is killed at once":
        os.kill(os.getpid(), signal.SIGKILL)

    def work(task: Any) -> Any:
        if isinstance(task, int):
            return task * task, os.getpid()
        (what,) = task
        if what == "blocked":
            return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "exit":
            os._exit(3)
        if what == "end":
            raise EOFError("the file ends too early")
        if what == "stubborn":
            raise StubbornError("cannot", "travel")
        if what == "half":  # four bytes say how long the message is, of which less follows
            pipe = multiprocessing.current_process()._args[0]
            os.write(pipe.fileno(), struct.pack("!i", 1000) + b"the beginning")
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()

    return work
