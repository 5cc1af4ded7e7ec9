"""Processes that work for one: their results, and how they and the work end when one of them does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from worker_processes import clerk

from duet_vlm.evaluation.workers import shared_out

KEPT = "start again"


def none_left() -> bool:
    return not multiprocessing.active_children()


def test_every_task_is_done_once_by_whoever_is_free() -> None:
    done = list(shared_out(range(20), ["a", "b", "c"], clerk, KEPT))
    assert sorted(task for task, _ in done) == list(range(20)) and all(reply[0] == task * task for task, reply in done)
    assert (
        1 <= len({reply[1] for _, reply in done}) <= 3
        and os.getpid() not in {reply[1] for _, reply in done}
        and none_left()
    )
    assert list(shared_out([], [None], clerk, KEPT)) == []


@pytest.mark.parametrize(
    ("task", "place", "says"),
    [
        (
            ("kill",),
            "cuda:1",
            r"worker 1 of 1 on cuda:1 \(process \d+\) was killed by SIGKILL, as .* where memory runs out; start again",
        ),
        (1, "is killed at once", r"worker 1 of 1 on is killed at once \(process \d+\) was killed by SIGKILL"),
        (("exit",), None, r"worker 1 of 1 \(process \d+\) ended by itself with exit code 3; start again"),
    ],
)
def test_a_process_that_dies_is_named(task: Any, place: str | None, says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        list(shared_out([task], [place], clerk, KEPT))
    assert none_left()


def test_one_dies_and_the_others_are_not_waited_for() -> None:
    """One is killed, the other has a task without end."""
    with pytest.raises(RuntimeError, match="of 2 .*SIGKILL"):
        list(shared_out([("for ever",), ("kill",)], [None, None], clerk, KEPT))
    assert none_left()


def test_killed_in_the_middle_of_its_reply() -> None:
    """The rest of the message is not waited for, also where the other process still could send something."""
    with pytest.raises(RuntimeError, match="SIGKILL"):
        list(shared_out([("for ever",), ("half",)], [None, None], clerk, KEPT))
    assert none_left()


@pytest.mark.parametrize(
    ("task", "place", "kind", "says"),
    [
        (1, "fails at once", ValueError, "^no such model$"),
        (("end",), None, EOFError, "^the file ends too early$"),
        (("stubborn",), None, RuntimeError, "^StubbornError: cannot travel$"),
    ],
)
def test_errors_travel(task: Any, place: str | None, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        list(shared_out([task], [place], clerk, KEPT))
    assert "worker_processes.py" in str(caught.value.__cause__) and none_left()


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no such thing on Windows")
def test_processes_do_not_hear_ctrl_c() -> None:
    """Nor the first ones of a program, with which Python starts its tracker of resources; and the program itself does."""
    program = "import signal, worker_processes; from duet_vlm.evaluation.workers import shared_out\n"
    program += "found = [reply for _, reply in shared_out([('blocked',), ('blocked',)], [None, None], worker_processes.clerk, '')]\n"
    program += "print(found, signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[True, True] False\n", "")


def test_processes_end_with_the_generator() -> None:
    made = shared_out([1, ("for ever",), ("for ever",)], [None, None], clerk, KEPT)
    assert next(made)[1][0] == 1 and not none_left()
    made.close()
    assert none_left()
