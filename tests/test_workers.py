"""Processes that share work on one machine: what they tell, and how they and the work end when one of them does."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from worker_processes import clerk

from duet_vlm.evaluation.ranks import start

KEPT = "start again"


def none_left() -> bool:
    return not multiprocessing.active_children()


def test_all_are_waited_for_and_their_parts_are_summed() -> None:
    told: list[int] = []
    start(clerk, ["a", "b", None], KEPT, told.append)
    assert told[-1] == 1 + 2 + 3 and told == sorted(told) and len(told) == 3 and none_left()


@pytest.mark.parametrize(
    ("places", "says"),
    [
        (["kill"], r"worker 1 of 1 on kill \(process \d+\) was killed by SIGKILL, as .* memory runs out; start again"),
        (["exit"], r"worker 1 of 1 on exit \(process \d+\) ended by itself with exit code 3; start again"),
        # the other has work without end; the rest of a message is not waited for
        (["for ever", "kill"], "worker 2 of 2 .*SIGKILL"),
        (["for ever", "half"], "worker 2 of 2 .*SIGKILL"),
        (["for ever", "fails"], "worker 2 of 2 on fails: no such model$"),
        (["stubborn"], "worker 1 of 1 on stubborn: cannot travel$"),
    ],
)
def test_one_that_dies_or_fails_is_named_and_ends_the_others(places: list[str], says: str) -> None:
    with pytest.raises(RuntimeError, match=says) as caught:
        start(clerk, places, KEPT, lambda done: None)
    assert none_left()
    assert "SIGKILL" in says or "exit code" in says or "worker_processes.py" in str(caught.value.__cause__)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no such thing on Windows")
def test_processes_do_not_hear_ctrl_c() -> None:
    """Nor the first ones of a program, with which Python starts its tracker of resources; and the program itself does."""
    program = "import signal, worker_processes; from duet_vlm.evaluation.ranks import start\nfound = []\n"
    program += "start(worker_processes.clerk, ['blocked', 'blocked'], '', found.append)\n"
    program += "print(max(found), signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("20 False\n", "")


def test_processes_end_with_an_interrupt() -> None:
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(clerk, ["for ever", "for ever"], KEPT, interrupt)
    assert none_left()
