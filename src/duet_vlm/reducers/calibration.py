"""Calibration of a method on one model: a file, and the check that it belongs to the model that it is used on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Calibration:
    """``data`` (plain values, or tensors by name) made by ``method`` for a model with the facts ``model``: family,
    layers, hidden, heads, tokens of an image."""

    method: str
    model: dict[str, Any]
    data: dict[str, Any]
    path: str = ""

    @property
    def advice(self) -> str:
        return f"make one for this model with 'duet-vlm calibrate {self.method} --model MODEL --image ...' (duet_vlm.api.calibrate.calibrate)"

    def save(self, path: str | Path) -> Path:
        """Tensors as safetensors, anything else as JSON; the suffix must say so.

        Raises
        ------
        ValueError
            Another suffix.
        """
        path = Path(path)
        tensors = any(isinstance(value, Tensor) for value in self.data.values())
        suffix = ".safetensors" if tensors else ".json"
        if path.suffix != suffix:
            raise ValueError(f"{path}: what {self.method} stores is a {suffix} file")
        path.parent.mkdir(parents=True, exist_ok=True)
        said = {"format": FORMAT, "method": self.method, "model": self.model}
        if tensors:
            save_file(self.data, path, {"duet_vlm": json.dumps(said)})
        else:
            path.write_text(json.dumps(said | {"data": self.data}, indent=1) + "\n")
        return path

    def check(self, facts: dict[str, Any]) -> None:
        """Raise a ValueError unless it was made for a model with these facts."""
        for name, here in facts.items():
            if self.model.get(name) != here:
                raise ValueError(
                    f"{self.path} was made for a model with {name} {self.model.get(name)}, this one has {here}: {self.advice}"
                )


def read(path: str, method: str, setting: str) -> Calibration:
    """The file that the setting of a method names.

    Raises
    ------
    TypeError, ValueError
        No path, no such file, not one that ``calibrate`` wrote, or one of another method.
    """
    if not isinstance(path, str):
        raise TypeError(f"{setting}={path!r}: give the path of a file as text")
    advice = Calibration(method, {}, {}).advice
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{setting}={path!r}: no such file; {advice}")
    try:
        stored = _read(path, file.stat().st_mtime_ns)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{setting}={path!r} is no file of duet-vlm calibrate ({error}); {advice}") from None
    if stored.method != method:
        raise ValueError(f"{setting}={path!r} was made for the method {stored.method}; {advice}")
    return stored


@lru_cache(maxsize=16)
def _read(path: str, changed: int) -> Calibration:
    if path.endswith(".safetensors"):
        with safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {})["duet_vlm"])
            said["data"] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    else:
        said = json.loads(Path(path).read_text())
    if said["format"] != FORMAT:
        raise ValueError(f"format {said['format']}, known is {FORMAT}")
    return Calibration(said["method"], said["model"], said["data"], path)
