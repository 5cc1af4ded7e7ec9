"""Models and tasks of installed packages, and what is said where duet-vlm-lab is not installed."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import duet_vlm
from duet_vlm.api import embedded
from duet_vlm.api.embedded import EmbeddedTask, embedded_model, embedded_task
from duet_vlm.cli.main import app
from duet_vlm.evaluation import tiny
from duet_vlm.evaluation.tasks import task
from duet_vlm.reducers import registry
from duet_vlm.train.data import conversations
from duet_vlm.utils import lab


@pytest.fixture
def core_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nothing but the core is installed."""

    def found(**wanted: Any) -> EntryPoints:
        return EntryPoints(entry for entry in entry_points(**wanted) if entry.value.startswith("duet_vlm."))

    monkeypatch.setattr(embedded, "entry_points", found)
    monkeypatch.setattr("duet_vlm.api.catalogue.entry_points", found)
    own = {name: cls for name, cls in duet_vlm.list_methods().items() if cls.__module__.startswith("duet_vlm.")}
    monkeypatch.setattr(registry, "_methods", own)


def test_the_core_offers_tiny_alone(core_alone: None) -> None:
    assert embedded.model_names() == embedded.task_names() == ["tiny"]
    assert embedded_model("tiny") is tiny.MODEL and embedded_task("tiny") is tiny.TASK


@pytest.mark.parametrize(
    "words", [("eval", "--tasks", "tiny-chain"), ("drop-curve", "--task", "tiny-page"), ("tune", "tiny-crowded")]
)
def test_a_task_of_the_lab_says_how_to_get_it(words: tuple[str, ...], core_alone: None, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "o")])
    said = " ".join(found.stderr.split())
    assert (
        found.exit_code == 2
        and f"task {words[-1]!r} is part of duet-vlm-lab, which is not installed: pip install -e lab in your clone"
        in said
    )


def test_a_model_of_the_lab_says_how_to_get_it(core_alone: None) -> None:
    found = CliRunner().invoke(app, ["budget", "-m", "tiny-chain", "-b", "64"])
    said = " ".join(found.stderr.split())
    assert (
        found.exit_code == 2
        and "--model 'tiny-chain' is part of duet-vlm-lab, which is not installed: pip install -e lab in your clone"
        in said
    )


@pytest.mark.parametrize("words", [("--oracle",), ("--methods", "whole_frames[frames=2]"), ("--methods", "custom")])
def test_a_method_of_the_lab_says_how_to_get_it(words: tuple[str, ...], core_alone: None, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["eval", *words, "--limit", "1", "--device", "cpu", "--out", str(tmp_path / "o")])
    assert found.exit_code == 2 and "is part of duet-vlm-lab, which is not installed" in " ".join(found.stderr.split())


def test_training_on_the_lab(core_alone: None) -> None:
    with pytest.raises(ValueError, match="data: 'tiny-crowded' is part of duet-vlm-lab"):
        conversations(["tiny-crowded"], limit=1)


def test_tasks_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that offers a task and its model needs nothing else to be found."""
    here = {
        embedded.TASKS: EntryPoint("fours", f"{__name__}:FOURS", embedded.TASKS),
        embedded.MODELS: EntryPoint("fours", "duet_vlm.evaluation.tiny:MODEL", embedded.MODELS),
    }
    monkeypatch.setattr(embedded, "entry_points", lambda group: EntryPoints([*entry_points(group=group), here[group]]))
    asked = task("fours").ask(3, 4)
    drawn = tiny.draw("test", 3, 8, "count") or tiny.draw("test", 3, 9, "count")
    assert drawn is not None and (asked.id, asked.kind, asked.answers) == ("3/4", "count", (drawn.answer,))
    assert "fours" in embedded.model_names() and embedded_model("fours").folder == tiny.path()
    assert "did you mean 'fours'" in str(pytest.raises(ValueError, task, "four").value)


def test_streams_and_their_faults() -> None:
    with pytest.raises(ValueError, match="index must be 0 or more, got -1"):
        tiny.sample("test", -1)
    with pytest.raises(ValueError, match="n must be 0 or more, got -2"):
        tiny.samples("test", -2)
    empty = EmbeddedTask("empty", tiny.MODEL, ("read",), lambda *_: None, tries=3)
    with pytest.raises(
        RuntimeError, match=r"none of 3 scenes offers a read question \(split 'test', seed 0, index 2\)"
    ):
        empty.sample("test", 2)
    assert tiny.prompt("what ?") == "USER: <image>\nwhat ? ASSISTANT:" == tiny.TASK.prompt("what ?", 1)
    assert set(lab.MODELS) < set(lab.TASKS)


FOURS = EmbeddedTask("fours", tiny.MODEL, ("count",), tiny.draw, tries=2)
