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
    record = to_record(reducer, budget)
    return record | {
        "settings": record["settings"] | {name: BESIDE for name in reducer.settings() if _names_weights(name)}
    }


def _names_weights(setting: str) -> bool:
    """True if a setting names a file of weights; compositions put the method in front."""
    return setting.rpartition("_")[2] == "weights"


def _located(settings: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Settings with the weights' file where the checkpoint is: its folder, or what was fetched from a hub with it."""
    return {
        name: _file_of(path) if _names_weights(name) and value == BESIDE else value for name, value in settings.items()
    }


def _file_of(path: str | Path) -> str:
    if Path(path).expanduser().is_dir():
        return str(Path(path).expanduser() / BESIDE)
    from transformers.utils import cached_file

    return cached_file(str(path), BESIDE) if path else BESIDE


def load_from_config(source: Any) -> dict[str, Any] | None:
    """The reduction that a model, its config or a checkpoint folder remembers: ``method``, ``budget`` and ``settings``;
    None if none.

    Raises
    ------
    ValueError
        A folder without config.json, or an entry that ``remember`` did not write.
    """
    if isinstance(source, str | Path):
        file = Path(source).expanduser() / "config.json"
        if not file.is_file():
            raise ValueError(f"{source}: no config.json there; give a checkpoint folder, a model or its config")
        record = json.loads(file.read_text()).get(KEY)
    else:
        config = getattr(source, "config", source)
        record, source = getattr(config, KEY, None), getattr(config, "_name_or_path", "")
    if record is None:
        return None
    if not isinstance(record, dict) or set(record) != PARTS or not isinstance(record["settings"], dict):
        raise ValueError(
            f"config.{KEY} is {record!r}: expected {', '.join(sorted(PARTS))}, as duet_vlm.save_to_config writes them"
        )
    return record | {"settings": _located({name: _tuples(value) for name, value in record["settings"].items()}, source)}


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
    path = Path(file).expanduser()
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON ({error})") from error
    written = "an object with method, budget and settings, as 'duet-vlm tune' writes it"
    if not isinstance(record, dict):
        raise ValueError(f"{file}: holds no reduction: {written}")
    if missing := sorted(PARTS - set(record)):
        raise ValueError(f"{file}: holds no reduction: {' and '.join(map(repr, missing))} missing; it is {written}")
    wrong = {
        "method": not isinstance(record["method"], str) or is_method_file(record["method"]),
        "settings": not isinstance(record["settings"], dict),
    }
    for part in (name for name, bad in wrong.items() if bad):
        raise ValueError(f"{file}: holds no reduction: {part!r} is {record[part]!r}; it is {written}")
    return {
        "method": record["method"],
        "budget": record["budget"],
        "settings": {name: _tuples(value) for name, value in record["settings"].items()},
    }


def _tuples(value: Any) -> Any:
    """JSON knows lists only; settings are tuples."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
