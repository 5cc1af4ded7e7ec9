"""The tables of docs/reduce-in-the-tower.md, from results/tower.json, tower_accuracy.json, tower_context.json,
tower_roofline.json, tower_tries.json and tower_rows.json.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import Any

from folders import SPEED, STUDIES

from duet_vlm.api.loading import load
from duet_vlm.evaluation.report.markdown import table
from duet_vlm.evaluation.tiny.network import VISUAL_TOKENS
from duet_vlm.models.lookup import adapter_for
from duet_vlm.profiling.flops import vision_flops
from duet_vlm.profiling.model_dims import VisionDims

FRAME = 64  # patches of a frame of the embedded clip model


def results(name: str) -> list[dict[str, Any]]:
    return json.loads(((SPEED if name == "tower" else STUDIES) / f"{name}.json").read_text())["results"]


def speed() -> str:
    """Time of the full model over that of the reduced one; choosing as a share of the whole tower's time."""
    lines = []
    for row in results("tower"):
        low, high = row["interval"]
        choice = row["name"].endswith("whole tower")
        style = "{:.2%}" if choice else "{:.2f}x"
        target = (
            "-" if row["target"] is None else f"{'at most' if choice else 'at least'} {style.format(row['target'])}"
        )
        promised = "-" if "predicted" not in row else f"{row['predicted']:.2f}x"
        lines.append(
            [
                row["name"],
                f"{style.format(row['median'])} ({style.format(low)} to {style.format(high)})",
                promised,
                target,
            ]
        )
    return table(["what", "median (95 % interval)", "by FLOPs", "target"], lines)


def told(row: dict[str, Any]) -> str:
    """Accuracy, and points against the whole tower."""
    if "difference" not in row:
        return f"{row['accuracy']:.3f}"
    low, high = (100 * end for end in row["interval"])
    return f"{row['accuracy']:.3f}, {100 * row['difference']:+.1f} ({low:+.1f} to {high:+.1f})"


def roofline() -> str:
    """Milliseconds to the first token of a large model, predicted."""
    lines = []
    for row in results("tower_roofline"):
        stages = [f"{1000 * row[name]:.0f}" for name in ("tower", "choice", "prefill", "first_token")]
        lines.append([row["input"], row["side"], *stages, f"{row['speed_up']:.2f}x"])
    return table(["picture", "side", "tower, ms", "choice, ms", "prefill, ms", "first token, ms", "faster"], lines)


@functools.cache
def tower_of(model: str) -> VisionDims:
    """The tower of an embedded model."""
    return adapter_for(load(model).model).vision_dims().read()


@functools.cache
def flops_of(label: str, model: str, tokens: int) -> str:
    """Share of its FLOPs that the tower of an embedded model needs for a picture or a frame of ``tokens``, of the
    whole one."""
    shape, share, rows = tower_of(model), re.search(r"(\d+)%", label), re.search(r"context of (\d+)", label)
    stages = () if share is None else ((0, tokens * int(share[1]) // 100 + (int(rows[1]) if rows else 0)),)
    return f"{vision_flops(shape, tokens, None, stages) / vision_flops(shape, tokens):.1%}"


def answers(file: str) -> str:
    """Accuracy behind each tower, against the same method behind the whole one."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in results(file):
        found.setdefault((row["method"], row["tower"]), {})[row["task"]] = told(row)
    tasks = list(dict.fromkeys(row["task"] for row in results(file)))
    lines = []
    for (method, tower), cells in sorted(found.items(), key=lambda item: item[0][0] != "duet_plus"):
        pictures = flops_of(tower, "tiny", VISUAL_TOKENS) if "tiny" in cells else "-"
        clips = flops_of(tower, "tiny-video", FRAME) if "tiny-video" in cells else "-"
        lines.append([tower, pictures, clips, f"`{method}`", *(cells.get(task, "-") for task in tasks)])
    return table(
        ["through the tower", "its FLOPs, pictures", "clips", "then, at 11 %", *(f"`{task}`" for task in tasks)], lines
    )


def tries(file: str, *tasks: str) -> str:
    """Other rules at the same costs, against the whole tower; at each cost the patches that each can afford."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for row in results(file):
        if row["task"] in tasks:
            cells = found.setdefault(
                (row["level"], row["tower"]), {"flops": f"{row['flops']:.1%}", "patches": str(row["patches"])}
            )
            cells[row["task"]] = told(row)
    lines = [
        [tower, cells["patches"], cells["flops"], *(cells.get(task, "-") for task in tasks)]
        for (_, tower), cells in found.items()
    ]
    return table(["tried", "patches that stay", "tower's FLOPs", *(f"`{task}`" for task in tasks)], lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "tower_speed": speed, "tower_roofline": roofline,
    "tower_answers": lambda: answers("tower_accuracy"), "tower_context": lambda: answers("tower_context"),
    "tower_rows": lambda: tries("tower_rows", "tiny", "tiny-crowded"), "tower_rows_clips": lambda: tries("tower_rows", "tiny-video"),
    "tower_tries": lambda: tries("tower_tries", "tiny", "tiny-crowded"), "tower_tries_clips": lambda: tries("tower_tries", "tiny-video"),
}  # fmt: skip
