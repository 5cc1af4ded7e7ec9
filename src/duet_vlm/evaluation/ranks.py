"""Work shared among processes that share nothing but a folder: those of a launcher (``accelerate launch``, torchrun), or
those that ``start`` starts on this machine.

Work is cut into parts that do not depend on the number of processes. Process r of n does every n-th part and records it
in a journal of its own, so no process waits for another, and parts that a killed process had not recorded are found by
the next start, with any number of processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

from duet_vlm.evaluation.journal import Journal, Page

PATIENCE = 10  # seconds for a process to end that was killed
POLL = 2.0  # seconds between two looks at how far they are

Work = Callable[[dict[str, list[str]]], Generator[tuple[str, Page], None, None]]


@dataclass(frozen=True)
class WorkerRank:
    """Rank of this process (``rank`` of ``world``), and its number on its machine (``local``)."""

    rank: int = 0
    world: int = 1
    local: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world}"

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> WorkerRank:
        """The rank in the variables of ``accelerate launch`` and torchrun; a single process without them.

        Raises
        ------
        ValueError
            RANK, WORLD_SIZE or LOCAL_RANK that cannot be.
        """
        given = {
            name: environment.get(name, usual)
            for name, usual in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        }
        said = " ".join(f"{name}={value}" for name, value in given.items())
        if not all(value.isdecimal() for value in given.values()) or int(given["RANK"]) >= int(given["WORLD_SIZE"]):
            raise ValueError(
                f"{said}: a launcher sets them to whole numbers with RANK from 0 to WORLD_SIZE - 1; unset them to run alone"
            )
        return cls(*map(int, given.values()))

    def device(self, given: str | None, gpus: int) -> str | None:
        """A GPU of its own for each process of a machine, unless ``given`` names one by number."""
        return f"cuda:{self.local % gpus}" if given in (None, "cuda") and gpus and self.world > 1 else given

    def check_restart(self, files: str) -> None:
        """Refuse to begin anew where others may be at work already; ``files`` is to be removed instead."""
        if self.world > 1:
            raise ValueError(
                f"--restart: {self.world} processes would delete each other's answers; remove {files} before you launch them"
            )

    def check_alone(self, verb: str) -> None:
        """Refuse to run a verb in ``world`` processes that has nothing to share."""
        if self.world > 1:
            raise ValueError(
                f"WORLD_SIZE={self.world}: the steps of duet-vlm {verb} depend on each other and are not shared among processes of a launcher; "
                "start it without one"
            )


ALONE = WorkerRank()


def gpus() -> int:
    """Number of CUDA devices of this process."""
    import torch

    return torch.cuda.device_count()


def lacking(parts: Sequence[str], runs: Sequence[str], known: Mapping[str, Page]) -> dict[str, list[str]]:
    """The runs that each part lacks, of those that lack any."""
    missing_runs = {part: [run for run in runs if run not in known.get(part, {"runs": ()})["runs"]] for part in parts}
    return {part: missing for part, missing in missing_runs.items() if missing}


def recorded(
    journal: Journal,
    worker: WorkerRank,
    parts: Sequence[str],
    runs: Sequence[str],
    work: Work,
    *,
    advance: Callable[[int, int], None],
    over: Callable[[], bool] = lambda: False,
) -> dict[str, Page] | None:
    """Do the unrecorded parts of this process's share, and return the pages of all processes; None as long as a part is
    missing.

    Parameters
    ----------
    journal : Journal
        Of this process, in a folder with those of all others.
    worker : WorkerRank
        The rank of this process.
    parts, runs : sequence of str
        All parts, of all processes in the same order; each is to have a page with these runs.
    work : callable
        Given the runs that each part of the share lacks, yields parts and their pages, each of which is on the disk
        before the next is made.
    advance : callable
        Called with (recorded parts, all parts) of this process's share.
    over : callable
        Returns True if another process has finished the job and removed the journals: called after they were read.

    Raises
    ------
    ValueError
        Journals about something else.
    """
    mine, known = parts[worker.rank :: worker.world], journal.together()
    if over():
        return None
    todo = lacking(mine, runs, known)
    advance(len(mine) - len(todo), len(mine))
    with contextlib.closing(work(todo)) as made:
        for done, (part, page) in enumerate(made, 1):
            journal.add(part, page)
            advance(len(mine) - len(todo) + done, len(mine))
    pages = journal.together()
    return None if lacking(parts, runs, pages) else pages


def start(work: Callable[[WorkerRank, Any], None], places: Sequence[Any], kept: str, watch: Callable[[], None]) -> None:
    """Run ``work`` in a process for each place, and wait for all of them; one that dies ends the others.

    Parameters
    ----------
    work : callable
        Called in each process with its rank and its place. It is pickled.
    kept : str
        End of the message about a process that died: where finished work is and how to go on.
    watch : callable
        Called every other second meanwhile.

    Raises
    ------
    RuntimeError
        A process died, or its work raised an error; names it and how.
    """
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

    with _without_interrupts():
        team: Any = start_processes(_serve, (work, places), len(places), join=False, daemon=True, start_method="spawn")

    def named(error: Any) -> str:
        place = places[error.error_index]
        return f"worker {error.error_index + 1} of {len(places)}" + (f" on {place}" if place else "")

    try:
        while not team.join(timeout=POLL):
            watch()
        watch()
    except ProcessRaisedException as error:
        kind, _, message = str(error).strip().splitlines()[-1].partition(": ")
        raise RuntimeError(f"{named(error)}: {message or kind}") from error
    except ProcessExitedException as error:
        raise RuntimeError(f"{named(error)} (process {error.error_pid}) {_end(error)}; {kept}") from None
    finally:
        for process in team.processes:
            process.kill()
            process.join(PATIENCE)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that are started inside do not hear Ctrl-C, which a terminal sends to all of them, until they are at
    work. Blocked and not ignored: what comes in the meantime is heard at the end."""
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


def _serve(number: int, work: Callable[[WorkerRank, Any], None], places: Sequence[Any]) -> None:
    if hasattr(signal, "pthread_sigmask"):
        # also what the system sends when the parent was killed: nobody is left to read a traceback
        signal.signal(signal.SIGINT, lambda *_: os._exit(0))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    work(WorkerRank(number, len(places), number), places[number])


def _end(error: Any) -> str:
    if error.signal_name is None:
        return f"ended by itself with exit code {error.exit_code}"
    memory = ", as the system does where memory runs out" if error.signal_name == "SIGKILL" else ""
    return f"was killed by {error.signal_name}{memory}"
