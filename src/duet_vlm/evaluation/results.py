"""Result files: everything that a table, a plot or a later analysis needs, in one JSON file with its origin."""

from __future__ import annotations

import base64
import json
import lzma
import os
import platform
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from duet_vlm.evaluation.source import Source, source

FORMAT = 1
ENCODING = "json+xz+base64"
NEEDED = ("format", "name", "task", "experiment", "environment", "model", "questions", "runs", "predictions")


def load(path: Path | str) -> dict[str, Any]:
    """A result file, checked.

    Raises
    ------
    ValueError
        Naming the file: missing, cut short, not a result file, or written by a version with another format.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(
            f"{path}: is not JSON, perhaps cut short ({error}); run the experiment again to make it anew"
        ) from error
    if not isinstance(data, dict) or "format" not in data:
        raise ValueError(f"{path}: is no result file of duet-vlm eval")
    if data["format"] != FORMAT:
        raise ValueError(
            f"{path}: format {data['format']!r}, but this version reads format {FORMAT}; run the experiment again with this version"
        )
    missing = [key for key in NEEDED if key not in data]
    if missing:
        raise ValueError(
            f"{path}: incomplete result file, {', '.join(missing)} missing; run the experiment again to make it anew"
        )
    return data


def save(path: Path, data: dict[str, Any]) -> None:
    """Write a result file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False) as file:
        file.write(json.dumps(data, indent=1) + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def pack(predictions: dict[str, Any]) -> dict[str, str]:
    """Predictions, compressed."""
    return {"encoding": ENCODING, "data": base64.b64encode(lzma.compress(json.dumps(predictions).encode())).decode()}


def unpack(result: dict[str, Any]) -> dict[str, Any]:
    """The predictions of a result: ids, kinds and accepted answers of the questions, and the answers of every run.

    Raises
    ------
    ValueError
        If they are damaged or packed in an unknown way.
    """
    packed = result["predictions"]
    if packed.get("encoding") != ENCODING:
        raise ValueError(f"predictions are packed as {packed.get('encoding')!r}; this version reads {ENCODING!r}")
    try:
        return json.loads(lzma.decompress(base64.b64decode(packed["data"], validate=True)))
    except (ValueError, KeyError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"the predictions of result {result.get('name')!r} are damaged ({error})") from error


def environment(device: str, dtype: str, workers: int, code: Source | None = None) -> dict[str, Any]:
    """Machine and versions that a result was made with; ``code`` is the package as it is on the disk now, unless
    given."""
    import torch

    code = code or source()
    return {
        **versions(),
        "commit": code.commit,
        "source": code.files,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "dtype": dtype,
        "workers": workers,
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def versions() -> dict[str, str]:
    """Versions of what answers."""
    import torch
    import transformers

    import duet_vlm

    return {
        "duet_vlm": duet_vlm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cpu_name() -> str:
    """The processor's name as Linux gives it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
