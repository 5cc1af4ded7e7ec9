"""The search as one picture: answers kept against measured time to the first token."""

from __future__ import annotations

import io
from typing import Any

from duet_vlm.evaluation.tune.binomial import percent
from duet_vlm.viz.colors import COLOURS, GRID, GROUND, INK, MUTED, RC

MARKERS = "os^DvpP<>h"


def pareto(result: dict[str, Any]) -> bytes:
    """A PNG of the search.

    One marker and colour per method, faint where a setting was dropped early. The line joins the full model and the
    settings with the whole test that no other of these beats in both; the bar is the chosen one's test.

    Raises
    ------
    ImportError
        Without matplotlib.
    """
    try:
        from matplotlib import style
    except ImportError as error:
        raise ImportError('the picture needs matplotlib: pip install ".[eval]" in your clone of duet-vlm') from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["candidates"] if row["ms"] and row["kept"] is not None]
    with style.context(RC, after_reset=True):
        figure = Figure(figsize=(7.6, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.grid(color=GRID, lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        methods = list(dict.fromkeys(row["label"] for row in rows))
        for number, method in enumerate(methods):
            own = [row for row in rows if row["label"] == method]
            look: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "color": COLOURS[number % len(COLOURS)]}
            sizes = [16 + 40 * (row["testing"]["asked"] > 0) for row in own]
            clear = [0.9 if row["choosing"]["asked"] >= result["questions"]["choosing"] else 0.3 for row in own]
            axes.scatter(
                [row["ms"] for row in own], [100 * row["kept"] for row in own], s=sizes, **look | {"alpha": clear}
            )
            axes.plot([], [], ls="", ms=6, label=method, **look)  # the legend's marker is neither faint nor large
        line = front(result)
        axes.plot([at for at, _ in line], [kept for _, kept in line], color=MUTED, lw=0.9, zorder=1)
        axes.plot(result["full_ms"], 100, marker="D", ms=7, color=INK, mec=GROUND, ls="", label="full model")
        keep = result["goal"]["keep"]
        if keep is not None:
            axes.axhline(100 * keep, color=INK, lw=0.9, ls=(0, (5, 2)), label=f"goal: {percent(keep)} kept")
        model, place_ = result["model"]["name"], result["environment"]
        axes.set_title(f"{result['task']} on {model}, {place_['device']} ({place_['cpu']})", fontsize=9, loc="left")
        axes.set(
            xlabel="measured time to the first token, ms per question (faster to the right)",
            ylabel="right answers kept, %",
        )
        axes.invert_xaxis()
        notes = "large: tested\nfaint: left early\nline: asked the whole test\nbar: down to the 95 % bound"
        figure.legend(
            fontsize=8, frameon=False, loc="outside right upper", title=notes, title_fontsize=7.5, alignment="left"
        )
        for row in rows:
            if row["id"] == result["chosen"]:
                axes.plot([row["ms"], row["ms"]], [100 * row["bound"], 100 * row["kept"]], color=INK, lw=2)
                name_beside(axes, row["id"], (row["ms"], 100 * row["kept"]))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def front(result: dict[str, Any]) -> list[tuple[float, float]]:
    """Milliseconds and percent kept of the settings with the whole test, from cheap to dear, each keeping more than all
    cheaper ones; last the full model. The few answers of the choosing rounds show too little to be included."""
    tried = [
        row
        for row in result["candidates"]
        if row["ms"] and row["testing"]["asked"] >= max(1, result["questions"]["testing"])
    ]
    out: list[tuple[float, float]] = []
    for row in sorted(tried, key=lambda row: (row["ms"], -row["kept"])):
        if not out or 100 * row["kept"] > out[-1][1]:
            out.append((row["ms"], 100 * row["kept"]))
    return [*out, (result["full_ms"], 100.0)] if out else []


def name_beside(axes: Any, text: str, point: tuple[float, float]) -> Any:
    """A label in bold beside a point, on the side where it covers the least of markers and lines and stays within the
    axes."""
    figure = axes.figure
    figure.draw_without_rendering()
    spots = [axes.transData.transform(spot) for drawn in axes.collections for spot in drawn.get_offsets()]
    for drawn in axes.lines:
        if drawn.get_transform() is axes.transData:
            ends = [axes.transData.transform(spot) for spot in drawn.get_xydata()]
            spots += [
                start + (end - start) * step / 40
                for start, end in zip(ends, ends[1:], strict=False)
                for step in range(41)
            ]
    inside = axes.get_window_extent()
    label = axes.annotate(text, point, xytext=(0, 0), textcoords="offset points", weight="bold")

    def cost(aside: tuple[float, float, str]) -> float:
        label.set_position(aside[:2])
        label.set_ha(aside[2])
        box = label.get_window_extent().padded(4)
        out = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
        return sum(box.contains(*spot) for spot in spots) + 100 * out

    sides = [
        (side * far, up, "left" if side > 0 else "right")
        for far in (9, 30, 60)
        for up in (7, -14, 20, -28, 34, -44)
        for side in (1, -1)
    ]
    best = min(sides, key=cost)  # the first of equals is the nearest
    cost(best)
    return label
