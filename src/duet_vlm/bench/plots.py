"""Pictures of a benchmark: time against tokens, speed-up against what FLOPs allow, cache against context."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``time.png``, ``speed_up.png`` and ``cache.png``."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("--plots needs matplotlib: pip install 'duet-vlm[viz]'") from error
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in found["rows"] if "ms" in row]
    pictures: dict[str, Callable[[Any, list[dict[str, Any]]], None]] = {"time": _time, "speed_up": _speed_up, "cache": _cache}
    return [_picture(folder / f"{name}.png", rows, paint) for name, paint in pictures.items()]


def _picture(file: Path, rows: list[dict[str, Any]], paint: Callable[[Any, list[dict[str, Any]]], None]) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    paint(axes, rows)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return file


def _by_method(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [row for row in rows if (row["method"] or "full") == name] for name in dict.fromkeys(row["method"] or "full" for row in rows)}


def _time(axes: Any, rows: list[dict[str, Any]]) -> None:
    for name, some in _by_method(rows).items():
        tokens, times = [row["mean_tokens"] for row in some], [row["ms"]["to first token"] for row in some]
        errors = [[t["median"] - t["low"] for t in times], [t["high"] - t["median"] for t in times]]
        axes.errorbar(tokens, [t["median"] for t in times], errors, fmt="o", label=name, capsize=2)
    axes.set(xlabel="mean visual tokens per decoder layer", ylabel="ms to the first token (median, quartiles)", ylim=(0, None))


def _speed_up(axes: Any, rows: list[dict[str, Any]]) -> None:
    for name, some in _by_method(rows).items():
        axes.plot([1 / row["flops_share"] for row in some], [row["speed_up"]["to first token"]["median"] for row in some], "o", label=name)
    most = max(1 / row["flops_share"] for row in rows)
    axes.plot([1, most], [1, most], color="gray", linewidth=1, label="as FLOPs")
    axes.set(xlabel="speed-up by FLOPs, pixels to first token", ylabel="measured")


def _cache(axes: Any, rows: list[dict[str, Any]]) -> None:
    for name, some in _by_method(rows).items():
        context = [(row["tokens"] + row["text"]) * row["batch"] for row in some]
        axes.plot(context, [(row["kv_bytes"] or 0) / 2**20 for row in some], "o", label=name)
    axes.set(xlabel="tokens of the prompts", ylabel="KV cache after prefill, MiB", ylim=(0, None))
