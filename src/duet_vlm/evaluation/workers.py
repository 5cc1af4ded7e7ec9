"""Processes of one machine that do tasks for this one. Each is on a pipe of its own: one that dies is heard of at once
and blocks nobody."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any

PATIENCE = 10  # seconds for a process to end that was killed, or has closed its pipe


@dataclass
class Worker:
    """A process, its pipe and its task; without a task it is still starting."""

    name: str
    process: Any
    pipe: Any
    task: Any = None

    @classmethod
    def start(cls, name: str, make: Callable[[Any], Callable[[Any], Any]], place: Any) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, make, place), daemon=True)
        process.start()
        theirs.close()  # the worker has the only one now, so that the pipe ends with it
        return cls(name, process, ours)

    def reply(self, kept: str) -> Any:
        """The worker's reply to its task; None once it has started."""
        try:
            found = self.pipe.recv()
        except (EOFError, OSError) as error:  # also in the middle of a message
            raise RuntimeError(f"{self.name} {self._end()}; {kept}") from error
        if isinstance(found, _Failure):
            raise found.error from _RemoteError(found.where)
        return found

    def _end(self) -> str:
        self.process.join(PATIENCE)
        code = self.process.exitcode
        if code is None:
            return f"(process {self.process.pid}) fell silent"
        if code >= 0:
            return f"(process {self.process.pid}) ended by itself with exit code {code}"
        killed = f"(process {self.process.pid}) was killed by {_signal(-code)}"
        return killed + (", as the system does where memory runs out" if _signal(-code) == "SIGKILL" else "")


def shared_out(
    tasks: Sequence[Any], places: Sequence[Any], make: Callable[[Any], Callable[[Any], Any]], kept: str
) -> Generator[tuple[Any, Any], None, None]:
    """Tasks and what processes make of them, as they get done; the processes end with the generator, however that ends.

    Parameters
    ----------
    tasks : sequence
        Given out one at a time, to whoever is free.
    places : sequence
        One for each process, which does its tasks by what ``make(place)`` returns there. All of them are pickled.
    kept : str
        End of the message about a process that died: where finished work is and how to go on.

    Raises
    ------
    RuntimeError
        A process died; names it and how. Errors of a task are raised as they are.
    """
    waiting, team = deque(tasks), []
    try:
        with _without_interrupts():
            for number, place in enumerate(places, 1):
                where = f" on {place}" if isinstance(place, str) else ""
                team.append(Worker.start(f"worker {number} of {len(places)}{where}", make, place))
        busy = {worker.pipe: worker for worker in team}
        while busy:
            for pipe in wait(busy):
                worker = busy[pipe]  # type: ignore[index]
                reply = worker.reply(kept)
                if worker.task is not None:
                    yield worker.task, reply
                worker.task = waiting.popleft() if waiting else None
                if worker.task is None:
                    del busy[pipe]  # type: ignore[arg-type]
                    continue
                with contextlib.suppress(OSError):  # it has died: its pipe says so next
                    pipe.send(worker.task)  # type: ignore[union-attr]
    finally:
        for worker in team:
            worker.process.kill()  # idle, or with a task that nobody waits for any more
        for worker in team:
            worker.process.join(PATIENCE)


@dataclass(frozen=True)
class _Failure:
    error: BaseException
    where: str


class _RemoteError(Exception):
    """The traceback of another process."""


def _serve(pipe: Any, make: Callable[[Any], Callable[[Any], Any]], place: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work = make(place)
        pipe.send(None)
        while True:
            pipe.send(work(pipe.recv()))
    except Exception as error:
        with contextlib.suppress(OSError):  # nobody listens where the parent was killed
            pipe.send(_Failure(_portable(error), traceback.format_exc()))


def _portable(error: Exception) -> Exception:
    """The error, or one with its words where it cannot travel between processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_with_parent() -> None:
    """End the worker if its parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that are started inside do not hear Ctrl-C, which a terminal sends to all of them: this one does, and
    ends them. Blocked and not ignored: what comes in the meantime is heard at the end."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # the first process that is started would start it, which (Python < 3.13) lets interrupts in again
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one without a name
        return f"signal {number}"
