"""Shared by all tests: one thread (the suite runs in parallel processes), the helper modules of this folder, no
network."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import duet_vlm

sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)
gc.disable()  # until all tests are collected


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of recorded cases for test_golden.py",
    )


@pytest.fixture(autouse=True)
def shared_models_come_back_plain() -> Iterator[None]:
    """Whoever leaves a reducer on one is told, and not the tests behind it."""
    yield
    families = sys.modules.get("families")
    lent = families.LENT if families else {}
    left = [name for name, model in lent.items() if duet_vlm.handle_of(model) is not None]
    for name in left:
        duet_vlm.detach(lent[name])
    lent.clear()
    assert not left, f"still attached: {left}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow the tests of a ``family`` that ``method_matrix.tier_families`` leaves out, unless they are marked
    ``every_family``.

    Tests of a ``case``, and of families times methods, have their tier from ``matrix`` and ``pairs``.
    """
    lists = {item: listed for item in items if (listed := _families_of(item))}
    if not lists:
        return
    from method_matrix import tier_families  # imports no more than tests of families have imported already

    for item, listed in lists.items():
        if item.callspec.params["family"] not in tier_families(listed, f"{item.module.__name__}.{item.originalname}"):
            item.add_marker(pytest.mark.slow)


def _families_of(item: pytest.Item) -> list[str]:
    """The families in a test's own parametrization."""
    if not hasattr(item, "callspec") or item.get_closest_marker("every_family"):
        return []
    for names, rows, *_ in (mark.args for mark in item.iter_markers("parametrize")):
        if names == "family":
            return [str(getattr(row, "values", [row])[0]) for row in rows]
        if not isinstance(names, str) and "family" in names:
            return [str(getattr(row, "values", row)[names.index("family")]) for row in rows]
    return []


def pytest_collection_finish() -> None:
    """Modules and tens of thousands of tests stay to the end: without this a tenth of the time goes into looking
    through them for garbage."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Of a run of all tests: how far the default tier goes, and how many known defects it was seen to find."""
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        from method_matrix import coverage

        mutants = json.loads(Path(__file__).with_name("mutants.json").read_text())
        terminalreporter.write_line(f"covered: {coverage()}")
        terminalreporter.write_line(
            f"mutants: {mutants['mutants_found']} of {mutants['mutants_run']} found (make mutants)"
        )


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes this process what a launcher starts."""

    def become(rank: int, world: int) -> None:
        for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))

    return become


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The process dies when it would record its second batch, in the middle of the line; as long as the list is not
    empty."""
    from duet_vlm.evaluation.journal import Journal

    real, alive, times = Journal.add, [1], []

    def add(self: Any, batch: str, page: dict[str, Any]) -> None:
        times.append(1)
        if alive and len(times) == 2:
            with self.path.open("a") as file:
                file.write('{"batch": "')
            raise KeyboardInterrupt
        real(self, batch, page)

    monkeypatch.setattr(Journal, "add", add)
    yield alive
