"""Experiments: the runs to measure and their questions. Written as JSON, so that a result can be reproduced."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duet_vlm.utils.field_types import flattened
from duet_vlm.utils.suggest import did_you_mean

BASELINE = "none"
ORACLE = "oracle"
REFERENCES = (ORACLE, "whole_frames")  # names that stand for no method
AGAINST = "duet"


@dataclass(frozen=True)
class ExperimentCell:
    """One method with its settings at one budget.

    Attributes
    ----------
    method : str
        The method.
    budget : int or float or None
        Its budget.
    settings : dict
        Its settings other than the defaults.
    label : str
        Its name in tables.
    preset : str or None
        A preset instead (then ``method`` is its method and ``budget`` None).
    beside : int or float or None
        Budget of the reference row that it is tested against (its own, unless its counts are set by hand).
    pieces : dict
        Options of ``attach`` for the chunks of videos.
    """

    method: str
    budget: int | float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    preset: str | None = None
    beside: int | float | None = None
    pieces: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Unique within an experiment: ``duet@0.11``, ``random[follow=duet]@0.11``, ``preset:duet-64``, ``none``."""
        if self.preset:
            return f"preset:{self.preset}"
        settings = ",".join(f"{key}={value}" for key, value in sorted(flattened(self.settings).items()))
        return (
            self.method + (f"[{settings}]" if settings else "") + ("" if self.budget is None else f"@{self.budget:g}")
        )


@dataclass(frozen=True)
class Experiment:
    """A comparison on one task.

    Attributes
    ----------
    task, model : str
        A task of :mod:`duet_vlm.evaluation.tasks`; a model as ``duet-vlm --model`` takes it.
    cells : tuple of dict
        Each with ``method`` (or ``preset``), and optionally ``budgets``, ``settings``, ``label`` and ``beside`` (see
        :class:`ExperimentCell`). The full model is always run first.
    seeds : tuple of int
        Streams of questions.
    limit : int or None
        Number of questions of each seed (None: all that the task has).
    batch : int
        Questions per batch. The questions of a batch depend on nothing else.
    against : str
        Label of the cell that all others are tested against, budget by budget. Without a cell of the default label,
        nothing is tested.
    chunk_frames, still_frames : optional
        As ``attach`` takes them, of every run but the full model.
    """

    task: str
    cells: tuple[dict[str, Any], ...]
    model: str = "tiny"
    seeds: tuple[int, ...] = (0,)
    limit: int | None = None
    batch: int = 40
    against: str = AGAINST
    chunk_frames: int | None = None
    still_frames: float | None = None

    def __post_init__(self) -> None:
        if not self.cells:
            raise ValueError("an experiment needs at least one cell, e.g. {'method': 'duet', 'budgets': [0.22]}")
        if (
            not self.seeds
            or len(set(self.seeds)) != len(self.seeds)
            or not all(isinstance(seed, int) and seed >= 0 for seed in self.seeds)
        ):
            raise ValueError(f"seeds={list(self.seeds)}: give different integers, 0 or more")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: ask at least 1 question per seed")
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}: give at least 1")
        for cell in self.cells:
            unknown = set(cell) - {"method", "preset", "budgets", "settings", "label", "beside"}
            if unknown or ("method" in cell) == ("preset" in cell):
                raise ValueError(
                    f"cell {cell}: needs 'method' or 'preset', and knows budgets, settings, label, beside; unknown: {sorted(unknown)}"
                )
        ids = [run.id for run in self.runs()]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"the experiment asks twice for {', '.join(twice)}")
        if self.against != AGAINST:
            self.check_against()

    def check_against(self) -> None:
        """Refuse a reference that is not among the runs."""
        labels = dict.fromkeys(run.label for run in self.runs())
        if self.against not in labels:
            raise ValueError(
                f"against {self.against!r}: no run is called so{did_you_mean(self.against, labels)}; there are {', '.join(labels)}"
            )

    def runs(self) -> list[ExperimentCell]:
        """The baseline, then every cell at each of its budgets, budget by budget."""
        cells = [self._expanded(cell) for cell in self.cells]
        longest = max(len(runs) for runs in cells)
        turns = [runs[i] for i in range(longest) for runs in cells if i < len(runs)]
        return [ExperimentCell(BASELINE, label="full model"), *(run for run in turns if run.id != BASELINE)]

    def _expanded(self, cell: dict[str, Any]) -> list[ExperimentCell]:
        if "preset" in cell:
            from duet_vlm import preset

            name = cell["preset"]
            return [
                ExperimentCell(
                    preset(name).name,
                    label=cell.get("label") or name,
                    preset=name,
                    beside=cell.get("beside"),
                    pieces=self.pieces,
                )
            ]
        settings = {key: _frozen(value) for key, value in (cell.get("settings") or {}).items()}
        words = ", ".join(f"{key} {value}" for key, value in settings.items())
        label = cell.get("label") or cell["method"] + (f" ({words})" if words else "")
        budgets = cell.get("budgets") or (None,)
        return [
            ExperimentCell(
                cell["method"], budget, settings, label, beside=cell.get("beside", budget), pieces=self.pieces
            )
            for budget in budgets
        ]

    @property
    def pieces(self) -> dict[str, Any]:
        """Options of ``attach`` for the chunks of videos."""
        given = {"chunk_frames": self.chunk_frames, "still_frames": self.still_frames}
        return {name: value for name, value in given.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        plain = json.loads(json.dumps(dataclasses.asdict(self)))
        return {
            name: value
            for name, value in plain.items()
            if name in self.pieces or name not in ("chunk_frames", "still_frames")
        }


def _frozen(value: Any) -> Any:
    """Lists of JSON as tuples: the settings of methods are hashable."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def from_json(data: Any, where: str) -> Experiment:
    """An experiment from parsed JSON; ``where`` names its origin in errors.

    Raises
    ------
    ValueError
        Naming ``where`` and the fault.
    """
    known = {item.name for item in dataclasses.fields(Experiment)}
    if not isinstance(data, dict) or not {"task", "cells"} <= set(data):
        raise ValueError(f"{where}: an experiment is a JSON object with 'task' and 'cells'")
    if set(data) - known:
        words = ", ".join(f"{key}{did_you_mean(key, known)}" for key in sorted(set(data) - known))
        raise ValueError(f"{where}: unknown entries {words}; known: {', '.join(sorted(known))}")
    if not isinstance(data["cells"], list) or not all(isinstance(cell, dict) for cell in data["cells"]):
        raise ValueError(
            f"{where}: 'cells' is a list of objects like {{'method': 'duet', 'budgets': [0.22]}}, got {data['cells']!r}"
        )
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    try:
        return Experiment(**values)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{where}: {error}") from error


def read(path: Path) -> Experiment:
    """An experiment file; ``ValueError`` names the file and the fault."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    return from_json(data, str(path))


CELL = re.compile(r"(?P<method>[\w.+/\\:~-]+)(\[(?P<settings>[^\]]*)\])?")


def cells_of(text: str) -> list[tuple[str, list[str]]]:
    """Parse ``duet,random[follow=duet]`` to [("duet", []), ("random", ["follow=duet"])].

    Settings inside brackets are split at ``;``. A method may be the path of a file that holds one (``out/duet.json``).

    Raises
    ------
    ValueError
        If the text has another form.
    """
    out = []
    for part in re.split(r",(?![^\[]*\])", text):
        match = CELL.fullmatch(part.strip())
        if not match:
            raise ValueError(
                f"--methods {part.strip()!r}: write names with commas between, settings in brackets: duet,random[follow=duet]"
            )
        pairs = [pair.strip() for pair in (match["settings"] or "").split(";") if pair.strip()]
        out.append((match["method"], pairs))
    return out
