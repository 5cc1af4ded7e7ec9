"""Controls of a method: their text, and the method with settings that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duet_vlm
from duet_vlm import Reducer, TowerReducer
from duet_vlm.planning.budget import Budget, read_budget
from duet_vlm.reducers.persistence import to_record
from duet_vlm.utils.field_types import flattened, is_setting_name, nested, read_value

NO_TOWER = "none"
SCHEDULE, KEEP = "schedule", "keep"


@dataclass(frozen=True)
class ChosenMethod:
    """A method to attach: its name, a budget, and settings."""

    method: str
    budget: Budget | None
    settings: dict[str, Any]

    @property
    def label(self) -> str:
        """Title of a column."""
        budget = self.budget
        words = (
            ""
            if budget is None
            else f" at {budget:.4g} tokens"
            if isinstance(budget, int)
            else f" at {100 * budget:.4g} %"
        )
        return self.method + words


@dataclass(frozen=True)
class Controls:
    """The controls of one method as they stand on the page; an empty text means: as the method does it by itself."""

    method: str
    budget: str = ""
    schedule: str = ""
    tower: str = NO_TOWER
    tower_keep: str = ""
    settings: str = ""

    @property
    def files(self) -> dict[str, Any]:
        """Settings that name files."""
        named = duet_vlm.make_method(self._whole).file_settings()
        return {name: value for name, value in self._lines.items() if name in named and value is not None}

    @property
    def _whole(self) -> str:
        """The method's name, with the one in the tower in front."""
        return "+".join([*([] if self.tower in ("", NO_TOWER) else [self.tower]), self.method.strip()])

    @property
    def _lines(self) -> dict[str, Any]:
        return nested(dict(_line(line) for line in self.settings.splitlines() if line.strip()))

    @classmethod
    def of(cls, method: str, budget: Budget | None, settings: Mapping[str, Any]) -> Controls:
        """The controls that mean this method: the other way round than ``read``."""
        first, _, behind = method.partition("+")
        tower = first if behind and first in tower_methods() else NO_TOWER
        rest = {name: value if isinstance(value, str) else repr(value) for name, value in flattened(settings).items()}
        keep = rest.pop(f"{tower}_{KEEP}", "")
        schedule = rest.pop(_setting(method, SCHEDULE) or "", "")
        lines = "\n".join(f"{name}={value}" for name, value in rest.items())
        amount = "" if budget is None else str(budget)
        return cls(method if tower == NO_TOWER else behind, amount, schedule, tower, keep, lines)

    def read(self, files: Mapping[str, Any] | None = None) -> ChosenMethod:
        """The method that they mean. ``files``: settings that name files, of whoever started the page; others would let
        visitors open any file.

        Raises
        ------
        ValueError
            An unknown method, a budget or a setting that does not read as one or is out of range, a schedule for a
            method that has none, a file that is not among ``files``; each named.
        """
        if not self.method.strip():
            raise ValueError("no method is chosen: choose one, or write several with a + between (frames+duet)")
        method = self._whole
        named = duet_vlm.make_method(method).file_settings()  # names what is unknown, or does not follow each other
        settings = self._lines
        if self.schedule.strip():
            name = _setting(method, SCHEDULE)
            if name is None:
                raise ValueError(f"schedule {self.schedule.strip()}: {method} has no schedule, leave it empty")
            settings[name] = read_value(self.schedule)
        if self.tower_keep.strip():
            if self.tower in ("", NO_TOWER):
                raise ValueError(
                    f"share of the patches {self.tower_keep.strip()}: choose a method in the tower as well, or leave it empty"
                )
            settings[f"{self.tower}_{KEEP}"] = read_value(self.tower_keep)
        for name, value in settings.items():
            if name in named and value not in (None, (files or {}).get(name)):
                raise ValueError(
                    f"setting {name}: the page opens no files; whoever starts it may name one (duet-vlm app --set {name}=FILE)"
                )
        return ChosenMethod(method, read_budget(self.budget) if self.budget.strip() else None, settings)


def tower_methods() -> list[str]:
    """Methods that stand in the vision tower in front of another one."""
    return [name for name, cls in duet_vlm.list_methods().items() if issubclass(cls, TowerReducer)]


def other_methods() -> list[str]:
    """All other methods."""
    return [name for name in duet_vlm.list_methods() if name not in tower_methods()]


def starting(method: str | Reducer | None, budget: Budget | None, settings: Mapping[str, Any], model: Any) -> Controls:
    """The controls as the page opens: what the command line asked for, else what the model was trained with, else DUET
    at 22 %."""
    if isinstance(method, Reducer):
        changed = to_record(method, budget)
        return Controls.of(changed["method"], budget, changed["settings"] | dict(settings))
    if method is None and (known := duet_vlm.load_from_config(model)) is not None:
        return Controls.of(
            known["method"], known["budget"] if budget is None else budget, known["settings"] | dict(settings)
        )
    own = budget is None and not settings
    return Controls.of(method or "duet", 0.22 if own and method is None else budget, settings)


def _setting(method: str, name: str) -> str | None:
    """Name of a setting in a method: its own, or with the name of the part that has it before it."""
    names = duet_vlm.make_method(method).settings()
    return next((setting for setting in names if setting == name or setting.endswith(f"_{name}")), None)


def _line(line: str) -> tuple[str, Any]:
    key, equals, value = line.partition("=")
    if not equals or not is_setting_name(key.strip()):
        raise ValueError(f"setting {line.strip()}: write it as key=value, one to a line")
    return key.strip(), read_value(value)
