"""A folder in which training can continue: its settings, its checkpoints, and its state."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

from duet_vlm.train.data import digest
from duet_vlm.train.settings import TrainSettings, settings_from
from duet_vlm.train.yaml_text import mapping, written

SETTINGS, STATE, DATA = "train.yaml", "trainer_state.json", "train.data"
UNFINISHED = f"{STATE}, which is written last, cannot be read"


def begin(settings: TrainSettings, restart: bool) -> None:
    """Claim the folder ``settings.out``; with ``restart`` the files of an earlier run are deleted first.

    Raises
    ------
    ValueError
        If it holds a run with other settings (those that differ are named), on data that have changed since, or another
        program's training, which is neither deleted nor continued.
    """
    out = Path(settings.out)
    file = out / SETTINGS
    contents = "".join(f"{line}\n" for line in _contents(settings))
    left = [*checkpoints(out), *([out / STATE] if finished(out) else [])]
    if left and not _ours(file):
        raise ValueError(
            f"{out} holds {left[0].name}, and no {SETTINGS} of duet-vlm train: it is another program's training, which is "
            "neither deleted nor gone on from. Choose another --out, or move it away"
        )
    if restart:
        for old in (out / STATE, out / DATA):
            old.unlink(missing_ok=True)
        for folder in checkpoints(out):
            (folder / STATE).unlink(missing_ok=True)  # a kill in between leaves nothing that looks whole
            shutil.rmtree(folder)
    elif left:  # a run that never came to a checkpoint may be corrected
        before, now = _flat(settings_from(config=file).to_dict()), _flat(settings.to_dict())
        differ = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if differ:
            raise ValueError(
                f"{out} holds a run with other settings ({', '.join(differ)}): choose another --out, or --restart to replace it"
            )
        if (out / DATA).exists() and (out / DATA).read_text() != contents:
            raise ValueError(
                f"{out} holds a run on other data: conversations or images have changed since; choose another --out, or --restart to replace it"
            )
    out.mkdir(parents=True, exist_ok=True)
    (out / DATA).write_text(contents)
    file.write_text(written(settings.to_dict()))


def _ours(file: Path) -> bool:
    """True if the folder holds settings of a run; those of an older version count, too."""
    try:
        given = mapping(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else {}
        return {"model", "data", "method", "trainer"} <= given.keys()
    except ValueError:  # not YAML, or not text
        return False


def _contents(settings: TrainSettings) -> list[str | None]:
    """Digests of the training data and of the held-out data."""
    files = ((settings.data, settings.limit), (settings.eval_data, settings.eval_limit))
    return [digest(sources, settings.images, limit) for sources, limit in files]


def finished(out: Path) -> bool:
    """True if a run is complete: its last act is to write the Trainer's state beside the model."""
    return (out / STATE).is_file()


def state(out: Path) -> dict[str, Any]:
    """Summary of a finished run: ``steps``, ``epoch``, and the last ``loss`` and ``eval_loss`` that were logged (None:
    never)."""
    record = json.loads((out / STATE).read_text())
    logged = {key: line[key] for line in record["log_history"] for key in ("loss", "eval_loss") if key in line}
    return {
        "steps": record["global_step"],
        "epoch": record["epoch"],
        "loss": logged.get("loss"),
        "eval_loss": logged.get("eval_loss"),
    }


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    folders = [path for path in out.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def last_whole(out: Path) -> Path | None:
    """The newest checkpoint that can be read; a newer one that a kill or a full disk left damaged is passed over with a
    warning.

    Raises
    ------
    ValueError
        If checkpoints were written to their end and none of them can be read.
    """
    lost = []
    for path in checkpoints(out):
        damage = damaged(path)
        if damage is None:
            return path
        warnings.warn(f"{path} is damaged ({damage}): going on from what was there before it", stacklevel=2)
        lost += [path] if damage != UNFINISHED else []
    if lost:
        raise ValueError(
            f"{out}: none of its checkpoints can be read ({', '.join(p.name for p in lost)}): --restart begins anew"
        )
    return None


def damaged(checkpoint: Path) -> str | None:
    """Fault of a checkpoint; None if every file of a known kind is complete. Headers are read, not weights."""
    from safetensors import SafetensorError, safe_open

    try:
        json.loads((checkpoint / STATE).read_text())  # written last
    except (OSError, ValueError):
        return UNFINISHED
    for file in sorted(checkpoint.rglob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError):
            return f"{file.name} is incomplete"
    for file in sorted([*checkpoint.rglob("*.pt"), *checkpoint.rglob("*.pth")]):
        if not zipfile.is_zipfile(file):  # the directory of a zip file is at its end
            return f"{file.name} is incomplete"
    return None


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {name: values}
    return {
        key: value
        for part, inner in values.items()
        for key, value in _flat(inner, f"{name}.{part}" if name else part).items()
    }
