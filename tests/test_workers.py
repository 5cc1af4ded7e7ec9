"""Processes that share work on one machine: how they, and the work, end when one of them does."""

from __future__ import annotations

import multiprocessing
from functools import partial
from pathlib import Path

import pytest
from worker_processes import clerk

from duet_vlm.evaluation import ranks
from duet_vlm.evaluation.ranks import start

KEPT = "start again"


def none_left() -> bool:
    return not multiprocessing.active_children()


def test_all_are_waited_for_and_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "POLL", 0.05)
    seen: list[int] = []
    start(partial(clerk, tmp_path), ["a", "b", None], KEPT, lambda: seen.append(len(list(tmp_path.iterdir()))))
    assert seen[0] == 0 and seen[-1] == 3 and seen == sorted(seen) and none_left()
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == [f"rank {n} of 3" for n in range(3)]


@pytest.mark.parametrize(
    ("places", "says"),
    [
        (["kill"], r"worker 1 of 1 on kill \(process \d+\) was killed by SIGKILL, as .* memory runs out; start again"),
        (["exit"], r"worker 1 of 1 on exit \(process \d+\) ended by itself with exit code 3; start again"),
        (["for ever", "kill"], "worker 2 of 2 .*SIGKILL"),  # the other has work without end
        (["for ever", "fails"], "worker 2 of 2 on fails: no such model$"),
        (["stubborn"], "worker 1 of 1 on stubborn: cannot travel$"),
    ],
)
def test_one_that_dies_or_fails_is_named_and_ends_the_others(tmp_path: Path, places: list[str], says: str) -> None:
    with pytest.raises(RuntimeError, match=says) as caught:
        start(partial(clerk, tmp_path), places, KEPT, lambda: None)
    assert none_left()
    assert "SIGKILL" in says or "exit code" in says or "worker_processes.py" in str(caught.value.__cause__)


def test_processes_end_with_an_interrupt(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(partial(clerk, tmp_path), ["for ever", "for ever"], KEPT, interrupt)
    assert none_left()
