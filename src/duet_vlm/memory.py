"""A reduction as plain values: in the config of a checkpoint that knows how it was trained (under ``duet_vlm``), or in a file of its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duet_vlm.budget import Budget
from duet_vlm.settings import plain

if TYPE_CHECKING:
    from duet_vlm.reducer import Reducer

KEY = "duet_vlm"  # of the config
PARTS = {"method", "budget", "settings"}


def record(reducer: Reducer, budget: Budget | None) -> dict[str, Any]:
    """What is written down: the method, the budget, and the settings that are not the method's defaults."""
    changed = {
        field.name: getattr(reducer, field.name) for field in dataclasses.fields(reducer) if getattr(reducer, field.name) != field.default
    }
    return {"method": reducer.name, "budget": plain(budget), "settings": changed}


def remembered(place: Any) -> dict[str, Any] | None:
    """The reduction that a model, its config or a checkpoint folder remembers: ``method``, ``budget`` and ``settings``; None if none.

    Raises
    ------
    ValueError
        A folder without config.json, or an entry that ``remember`` did not write.
    """
    if isinstance(place, str | Path):
        file = Path(place).expanduser() / "config.json"
        if not file.is_file():
            raise ValueError(f"{place}: no config.json there; give a checkpoint folder, a model or its config")
        found = json.loads(file.read_text()).get(KEY)
    else:
        found = getattr(getattr(place, "config", place), KEY, None)
    if found is None:
        return None
    if not isinstance(found, dict) or set(found) != PARTS or not isinstance(found["settings"], dict):
        raise ValueError(f"config.{KEY} is {found!r}: expected {', '.join(sorted(PARTS))}, as duet_vlm.remember writes them")
    return found | {"settings": {name: _tuples(value) for name, value in found["settings"].items()}}


def names_file(method: object) -> bool:
    """Whether what is given as a method is the name of a file that holds one (``duet.json``)."""
    return isinstance(method, Path) or isinstance(method, str) and method.endswith(".json")


def saved(file: str | Path) -> dict[str, Any]:
    """The reduction in a file: ``method``, ``budget`` and ``settings``; what else stands there is left out.

    Raises
    ------
    ValueError
        The file cannot be read, or holds no reduction; it is named.
    """
    place = Path(file).expanduser()
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON ({error})") from error
    whole = isinstance(found, dict) and set(found) >= PARTS
    if not whole or not isinstance(found["method"], str) or names_file(found["method"]) or not isinstance(found["settings"], dict):
        raise ValueError(f"{file}: holds no reduction: an object with method, budget and settings, as 'duet-vlm tune' writes it")
    return {"method": found["method"], "budget": found["budget"], "settings": {name: _tuples(value) for name, value in found["settings"].items()}}


def _tuples(value: Any) -> Any:
    """JSON knows lists only; settings are tuples."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
