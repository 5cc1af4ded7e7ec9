"""A reduction as plain values: in the config of a checkpoint that knows how it was trained (under ``duet_vlm``), or in
a file of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duet_vlm.planning.budget import Budget
from duet_vlm.utils.field_types import to_plain

if TYPE_CHECKING:
    from duet_vlm.reducers.base import Reducer

KEY = "duet_vlm"  # of the config
BESIDE = "duet_vlm.safetensors"  # weights of a method's own, in the folder of a checkpoint
PARTS = {"method", "budget", "settings"}


def to_record(reducer: Reducer, budget: Budget | None) -> dict[str, Any]:
    """The record that is saved: the method, the budget, and the settings that are not the method's defaults."""
    settings, usual = reducer.settings(), reducer.usual_settings()
    changed = {name: value for name, value in settings.items() if name != "options" and value != usual[name]}
    options = {
        name: value
        for name, value in reducer.options.given().items()
        if value != getattr(reducer.usual_options(), name)
    }
    return {
        "method": reducer.name,
        "budget": to_plain(budget),
        "settings": changed | ({"options": options} if options else {}),
    }


def to_checkpoint_record(reducer: Reducer, budget: Budget | None) -> dict[str, Any]:
    """As ``record``, for the config of a checkpoint: weights of the method's own are in the file beside it."""
    found = to_record(reducer, budget)
    return found | {
        "settings": found["settings"] | {name: BESIDE for name in reducer.settings() if _names_weights(name)}
    }


def _names_weights(setting: str) -> bool:
    """True if a setting names a file of weights; compositions put the method in front."""
    return setting.rpartition("_")[2] == "weights"


def _located(settings: dict[str, Any], place: str | Path) -> dict[str, Any]:
    """Settings with the weights' file where the checkpoint is: its folder, or what was fetched from a hub with it."""
    return {
        name: _file_of(place) if _names_weights(name) and value == BESIDE else value for name, value in settings.items()
    }


def _file_of(place: str | Path) -> str:
    if Path(place).expanduser().is_dir():
        return str(Path(place).expanduser() / BESIDE)
    from transformers.utils import cached_file

    return cached_file(str(place), BESIDE) if place else BESIDE


def load_from_config(place: Any) -> dict[str, Any] | None:
    """The reduction that a model, its config or a checkpoint folder remembers: ``method``, ``budget`` and ``settings``;
    None if none.

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
        config = getattr(place, "config", place)
        found, place = getattr(config, KEY, None), getattr(config, "_name_or_path", "")
    if found is None:
        return None
    if not isinstance(found, dict) or set(found) != PARTS or not isinstance(found["settings"], dict):
        raise ValueError(
            f"config.{KEY} is {found!r}: expected {', '.join(sorted(PARTS))}, as duet_vlm.save_to_config writes them"
        )
    return found | {"settings": _located({name: _tuples(value) for name, value in found["settings"].items()}, place)}


def is_method_file(method: object) -> bool:
    """True if a given method is the name of a file that holds one (``duet.json``)."""
    return isinstance(method, Path) or isinstance(method, str) and method.endswith(".json")


def load_from_file(file: str | Path) -> dict[str, Any]:
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
    written = "an object with method, budget and settings, as 'duet-vlm tune' writes it"
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds no reduction: {written}")
    if missing := sorted(PARTS - set(found)):
        raise ValueError(f"{file}: holds no reduction: {' and '.join(map(repr, missing))} missing; it is {written}")
    wrong = {
        "method": not isinstance(found["method"], str) or is_method_file(found["method"]),
        "settings": not isinstance(found["settings"], dict),
    }
    for part in (name for name, bad in wrong.items() if bad):
        raise ValueError(f"{file}: holds no reduction: {part!r} is {found[part]!r}; it is {written}")
    return {
        "method": found["method"],
        "budget": found["budget"],
        "settings": {name: _tuples(value) for name, value in found["settings"].items()},
    }


def _tuples(value: Any) -> Any:
    """JSON knows lists only; settings are tuples."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
