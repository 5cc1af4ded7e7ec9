"""Work shared among the processes of a launcher (``accelerate launch``, torchrun), which share nothing but a folder.

Work is cut into parts that do not depend on the number of processes. Process r of n does every n-th part and records it
in a journal of its own, so no process waits for another, and parts that a killed process had not recorded are found by
the next start, with any number of processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

from duet_vlm.evaluation.journal import Journal, Page

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

    def device(self, asked: str | None, gpus: int) -> str | None:
        """A GPU of its own for each process of a machine, unless ``requested`` names one by number."""
        return f"cuda:{self.local % gpus}" if asked in (None, "cuda") and gpus and self.world > 1 else asked

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
    todo = {part: lacking for part in mine if (lacking := _lacking(runs, known.get(part)))}
    advance(len(mine) - len(todo), len(mine))
    with contextlib.closing(work(todo)) as made:
        for done, (part, page) in enumerate(made, 1):
            journal.add(part, page)
            advance(len(mine) - len(todo) + done, len(mine))
    found = journal.together()
    return None if any(_lacking(runs, found.get(part)) for part in parts) else found


def _lacking(runs: Sequence[str], page: Page | None) -> list[str]:
    return [run for run in runs if page is None or run not in page["runs"]]
