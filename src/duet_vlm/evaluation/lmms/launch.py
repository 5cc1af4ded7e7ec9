"""Start lmms-eval as its own process, with our model and our task folder, and read its results."""

from __future__ import annotations

import codecs
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from duet_vlm.evaluation.lmms.arguments import parse_arguments, value_of
from duet_vlm.evaluation.lmms.plugin import MODEL

TASKS = Path(__file__).parent / "tasks"  # for --include_path
INSTALL = 'lmms-eval is not installed here: pip install ".[lmms]" in your clone of duet-vlm (in an environment of its own: about a hundred packages)'


def run(
    model: str,
    tasks: str | Sequence[str],
    *,
    method: str | None = None,
    budget: int | float | None = None,
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
    limit: int | None = None,
    batch: int = 1,
    device: str | None = None,
    out: Path | str = "out/lmms-eval",
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate one method at one budget through lmms-eval; its output is shown as it comes.

    Parameters
    ----------
    model : str
        Hub id, folder, or "tiny".
    tasks : str or sequence of str
        Tasks of lmms-eval, or ``duet_tiny`` (questions for the embedded model, ships with this package).
    method, budget, preset, settings
        As in Python: a preset alone, or a method (default duet; "none" is the full model) with budget and settings.
    limit : int, optional
        The first questions of each task only.
    batch : int
    device : str, optional
    out : path
        Folder for lmms-eval's results, its per-question samples, its log, and what the run cost.
    arguments : mapping, optional
        Further model arguments, for example ``{"dtype": "bfloat16", "attn_implementation": "sdpa"}``.

    Returns
    -------
    dict
        ``label``, ``tasks`` (task -> metric -> value), ``measured`` (tokens, FLOPs and cache bytes, see ``costs.py``),
        ``samples`` (task -> JSON-lines file), ``results`` (lmms-eval's file), ``lmms_eval`` (its version) and
        ``command``.

    Raises
    ------
    ImportError
        Without lmms-eval.
    ValueError
        Settings that contradict each other, a text that lmms-eval's argument syntax cannot carry.
    RuntimeError
        lmms-eval ended without results; its last error is in the message, all of its output in the log.
    """
    model_arguments = parse_arguments(method, budget, preset, settings or {})  # a mistake is cheap here
    if importlib.util.find_spec("lmms_eval") is None:
        raise ImportError(INSTALL)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.rglob("*_results.json"))
    measured, log = folder / "duet_vlm_measured.json", folder / "lmms-eval.log"
    measured.unlink(missing_ok=True)
    arguments_given = {"pretrained": model, "method": method, "budget": budget, "preset": preset, **(arguments or {}), "measured": measured}
    if settings:
        arguments_given["settings"] = json.dumps(dict(settings))
    names = tasks if isinstance(tasks, str) else ",".join(tasks)
    command = [sys.executable, "-m", "lmms_eval", "--model", MODEL, "--model_args", argument_text(arguments_given), "--tasks", names]
    command += ["--batch_size", str(batch), "--include_path", str(TASKS), "--output_path", str(folder), "--log_samples"]
    command += ["--limit", str(limit)] if limit is not None else []
    command += ["--device", device] if device is not None else []
    code = _run_shown(command, log)
    files = set(folder.rglob("*_results.json")) - before
    if len(files) != 1 or not measured.exists():  # lmms-eval reports its own errors and then ends with code 0
        raise RuntimeError(f"lmms-eval ended without results (exit code {code}): {_last_error(log)} (all of its output: {log})")
    (file,) = files
    results = json.loads(file.read_text())
    return {
        "label": model_arguments.label,
        "tasks": {task: _metrics(values) for task, values in results["results"].items()},
        "measured": json.loads(measured.read_text()),
        "samples": {path.stem.split("_samples_", 1)[1]: str(path) for path in sorted(file.parent.glob(f"{_stamp(file)}_samples_*.jsonl"))},
        "results": str(file),
        "lmms_eval": version("lmms-eval"),
        "command": command,
    }


def argument_text(given: Mapping[str, Any]) -> str:
    """``a=1,b=text`` as lmms-eval splits it; what is None stays away.

    Raises
    ------
    ValueError
        For a text with a comma or quotes outside of JSON, which lmms-eval would cut.
    """
    parts = []
    for name, value in given.items():
        text = str(value)
        if value is None:
            continue
        if not isinstance(value_of(text), dict) and any(sign in text for sign in ",'\"{}[]"):
            raise ValueError(f"{name}={text}: lmms-eval's --model_args cannot carry commas, quotes or brackets; use another path "
                "or name")
        parts.append(f"{name}={text}")
    return ",".join(parts)


def _run_shown(command: Sequence[str], log: Path) -> int:
    """Run a command, its output on screen and in ``log``."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a chunk may end within a letter
    with log.open("wb") as file, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        while chunk := process.stdout.read1():  # type: ignore[attr-defined]
            file.write(chunk)
            sys.stdout.write(decoder.decode(chunk))
            sys.stdout.flush()
    return process.returncode


def _last_error(log: Path) -> str:
    """The last line of a log that reads like an error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if "Error" in line or "error" in line]
    return lines[-1] if lines else "no error message"


def _stamp(results: Path) -> str:
    return results.name.removesuffix("_results.json")


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """lmms-eval's ``metric,filter`` keys without the filter that does nothing."""
    return {key.removesuffix(",none"): value for key, value in values.items() if isinstance(value, int | float)}
