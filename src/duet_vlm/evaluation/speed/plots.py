"""Plots of a benchmark: time against tokens, speed-up against FLOPs, cache against context."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from duet_vlm.evaluation.report.style import Look, looks, plain
from duet_vlm.viz.colors import GRID, INK, MUTED, RC

Rows = list[dict[str, Any]]


def draw(measured: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``time.png``, ``speed_up.png`` and ``cache.png``. Each names the model and the device."""
    try:
        from matplotlib import style
    except ImportError as error:
        raise ImportError('--plots needs matplotlib: pip install ".[viz]" in your clone of duet-vlm') from error
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in measured["rows"] if "ms" in row]
    pictures: dict[str, Callable[[Any, Rows], None]] = {"time": _time, "speed_up": _speed_up, "cache": _cache}
    with style.context(RC, after_reset=True):
        return [_picture(folder / f"{name}.png", title(measured), rows, paint) for name, paint in pictures.items()]


def title(measured: dict[str, Any]) -> str:
    """Model, dtype and device of the measurement."""
    made = measured["environment"]
    cpu = f" ({made['cpu']}, {made['threads']} threads)" if made["device"].startswith("cpu") and "cpu" in made else ""
    return f"{plain(measured['model'])}, {made['dtype']}, on {made['device']}{cpu}"


def _picture(file: Path, head: str, rows: Rows, paint: Callable[[Any, Rows], None]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(head, fontsize=9, loc="left")
    paint(axes, rows)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=160, metadata={"Software": None})
    return file


def _groups(rows: Rows, *keys: str) -> dict[tuple[Any, ...], Rows]:
    """Rows that agree in ``keys``, in the order in which they first appear."""
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _looks(rows: Rows) -> dict[str | None, Look]:
    """Of each method, as in a report; the full model (no method) in ink."""
    methods = [method for (method,) in _groups(rows, "method")]
    return {None: Look(INK, "D", "-", 1.7, 6)} | looks({method: method for method in methods if method})


def _points(
    axes: Any, rows: Rows, x: Callable[[dict[str, Any]], float], y: Callable[[dict[str, Any]], dict[str, float]]
) -> None:
    """One colour and marker per method, one shade of filling per prompt (batch and length of the text); whiskers from
    low to high."""
    styles = _looks(rows)
    prompts = list(_groups(rows, "batch", "text"))
    for (method, batch, text), some in _groups(rows, "method", "batch", "text").items():
        values, look = [y(row) for row in some], styles[method]
        errors = [[f["median"] - f["low"] for f in values], [f["high"] - f["median"] for f in values]]
        solid = 1 - 0.7 * prompts.index((batch, text)) / max(1, len(prompts) - 1)
        face = look.colour if look.filled else "none"
        axes.errorbar(
            [x(row) for row in some], [f["median"] for f in values], errors, fmt=look.marker, color=look.colour, mfc=face, ms=look.size, alpha=solid,
            capsize=2,
        )  # fmt: skip
    for method in (method for (method,) in _groups(rows, "method")):
        look = styles[method]
        axes.plot(
            [],
            [],
            look.marker,
            color=look.colour,
            mfc=look.colour if look.filled else "none",
            ms=look.size,
            label=method or "full model",
        )
    if len(prompts) > 1:
        for column, (batch, text) in enumerate(prompts):
            axes.plot(
                [],
                [],
                "o",
                color=MUTED,
                alpha=1 - 0.7 * column / (len(prompts) - 1),
                label=f"batch {batch}, {text} other tokens",
            )


def _time(axes: Any, rows: Rows) -> None:
    _points(axes, rows, lambda row: row["mean_tokens"], lambda row: row["ms"]["to first token"])
    axes.set(
        xlabel="mean visual tokens per decoder layer",
        ylabel="ms to the first token (median, quartiles)",
        ylim=(0, None),
    )


def _speed_up(axes: Any, rows: Rows) -> None:
    _points(axes, rows, lambda row: 1 / row["flops_share"], lambda row: row["speed_up"]["to first token"])
    most = max(1 / row["flops_share"] for row in rows)
    axes.plot([1, most], [1, most], color=MUTED, linewidth=1, label="as FLOPs")
    axes.set(xlabel="speed-up by FLOPs, pixels to first token", ylabel="measured (median, 95 % interval)")


def _cache(axes: Any, rows: Rows) -> None:
    """All methods share a line at the same budget."""
    groups = _groups(rows, "budget", "batch")
    names = {
        key: ("full model" if key[0] is None else f"budget {key[0]:g}") + (f", batch {key[1]}" if key[1] > 1 else "")
        for key in groups
    }
    styles = looks(dict.fromkeys(names.values(), ""))
    for key, some in groups.items():
        line = dict(sorted({row["tokens"] + row["text"]: (row["kv_bytes"] or 0) / 2**20 for row in some}.items()))
        look = styles[names[key]]
        axes.plot(
            list(line),
            list(line.values()),
            color=look.colour,
            ls=look.dash,
            marker=look.marker,
            ms=look.size,
            label=names[key],
        )
    axes.set(xlabel="tokens of a prompt", ylabel="KV cache after prefill, MiB", ylim=(0, None))
