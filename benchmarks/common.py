"""What every benchmark shares: the sizes of a run, the environment it ran in, and the file it writes."""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from shapes import Shape

import duet_vlm
from duet_vlm.evaluation.results import cpu_name
from duet_vlm.profiling.timing import PairedTiming, ratio

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    """``quick`` runs tiny shapes a few times, to see that everything works; its figures mean nothing."""

    quick: bool = False
    out: Path = HERE / "results"

    def repeats(self, full: int) -> int:
        return 3 if self.quick else full


def side_by_side(
    name: str, shape: Shape, a: PairedTiming, b: PairedTiming, target: float | None = None, **more: Any
) -> dict[str, Any]:
    """Time of ``a`` over time of ``b``, pair by pair: median, quartiles, 95 % interval of the median, and the target it
    is held against."""
    found = ratio(a, b)
    each = PairedTiming(tuple(x / y for x, y in zip(a.seconds, b.seconds, strict=True)))
    row: dict[str, Any] = {
        "name": name,
        "median": found.median,
        "interval": [found.low, found.high],
        "quartiles": each.quartiles,
    }
    row |= {"pairs": len(each.seconds), "target": target}
    if target is not None:
        row["met"] = found.median <= target
    return row | {"milliseconds": [1000 * a.median, 1000 * b.median]} | more | {"shape": dataclasses.asdict(shape)}


def environment() -> dict[str, Any]:
    return {
        "duet_vlm": duet_vlm.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "dtype": "float32",
        "attention": "sdpa",
    }


def write(options: Options, name: str, rows: list[dict[str, Any]]) -> Path:
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}.json"
    path.write_text(
        json.dumps({"benchmark": name, "quick": options.quick, "environment": environment(), "results": rows}, indent=1)
        + "\n"
    )
    return path


def say(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if "interval" not in row:
            print(f"{row['name']:<44} {row['status']}: {row['reason']}", file=sys.stderr)
            continue
        low, high = row["interval"]
        aim = "" if row["target"] is None else f"  target {row['target']:.3f} {'met' if row['met'] else 'MISSED'}"
        predicted = "" if "predicted" not in row else f"  by FLOPs {row['predicted']:.3f}"
        print(
            f"{row['name']:<44} {row['median']:.4f} [{low:.4f}, {high:.4f}] of {row['pairs']}{aim}{predicted}",
            file=sys.stderr,
        )


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(HERE), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git(
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            "../src",
            "../lab",
            ".",
            ":!results",
            ":!../lab/studies/results",
            ":!../lab/comparison",
        )
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
