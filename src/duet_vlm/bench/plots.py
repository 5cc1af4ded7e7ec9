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
        raise ImportError('--plots needs matplotlib: pip install ".[viz]" in your clone of duet-vlm') from error
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


def _groups(rows: list[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows that agree in ``keys``, in the order in which they first appear."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def _points(axes: Any, rows: list[dict[str, Any]], x: Callable[[dict[str, Any]], float], y: Callable[[dict[str, Any]], dict[str, float]]) -> None:
    """One colour per method, one mark per prompt (batch and length of the text); whiskers from low to high."""
    colors = {method: f"C{i}" for i, (method,) in enumerate(_groups(rows, "method"))}
    marks = dict(zip(_groups(rows, "batch", "text"), "os^Dv*PX", strict=False))
    for (method, batch, text), some in _groups(rows, "method", "batch", "text").items():
        found = [y(row) for row in some]
        errors = [[f["median"] - f["low"] for f in found], [f["high"] - f["median"] for f in found]]
        mark = marks.get((batch, text), "o")
        axes.errorbar([x(row) for row in some], [f["median"] for f in found], errors, fmt=mark, color=colors[method], capsize=2)
    for method, color in colors.items():
        axes.plot([], [], "o", color=color, label=method or "full")
    if len(marks) > 1:
        for (batch, text), mark in marks.items():
            axes.plot([], [], mark, color="gray", label=f"batch {batch}, {text} other tokens")


def _time(axes: Any, rows: list[dict[str, Any]]) -> None:
    _points(axes, rows, lambda row: row["mean_tokens"], lambda row: row["ms"]["to first token"])
    axes.set(xlabel="mean visual tokens per decoder layer", ylabel="ms to the first token (median, quartiles)", ylim=(0, None))


def _speed_up(axes: Any, rows: list[dict[str, Any]]) -> None:
    _points(axes, rows, lambda row: 1 / row["flops_share"], lambda row: row["speed_up"]["to first token"])
    most = max(1 / row["flops_share"] for row in rows)
    axes.plot([1, most], [1, most], color="gray", linewidth=1, label="as FLOPs")
    axes.set(xlabel="speed-up by FLOPs, pixels to first token", ylabel="measured (median, 95 % interval)")


def _cache(axes: Any, rows: list[dict[str, Any]]) -> None:
    """All methods share a line at the same budget."""
    for (budget, batch), some in _groups(rows, "budget", "batch").items():
        line = dict(sorted({row["tokens"] + row["text"]: (row["kv_bytes"] or 0) / 2**20 for row in some}.items()))
        label = "full" if budget is None else f"budget {budget:g}"
        axes.plot(list(line), list(line.values()), "o-", label=label + (f", batch {batch}" if batch > 1 else ""))
    axes.set(xlabel="tokens of a prompt", ylabel="KV cache after prefill, MiB", ylim=(0, None))
