"""The search as one picture: answers kept against measured time to the first token."""

from __future__ import annotations

import io
from typing import Any

from duet_vlm.palette import COLOURS, GRID, GROUND, INK, MUTED, RC

MARKERS = "os^DvpP<>h"


def pareto(result: dict[str, Any]) -> bytes:
    """A PNG. One marker and colour per method; the line joins settings that no other beats in both; the bar is the chosen one's test.

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
        for place, method in enumerate(methods):
            own = [row for row in rows if row["label"] == method]
            look: dict[str, Any] = {"marker": MARKERS[place % len(MARKERS)], "color": COLOURS[place % len(COLOURS)]}
            sizes = [16 + 40 * (row["testing"]["asked"] > 0) for row in own]
            axes.scatter([row["ms"] for row in own], [100 * row["kept"] for row in own], s=sizes, label=method, alpha=0.85, **look)
        front = _front(rows)
        axes.plot([row["ms"] for row in front], [100 * row["kept"] for row in front], color=MUTED, lw=0.9, zorder=1)
        axes.plot(result["full_ms"], 100, marker="D", ms=7, color=INK, mec=GROUND, ls="", label="full model")
        keep = result["goal"]["keep"]
        if keep is not None:
            axes.axhline(100 * keep, color=INK, lw=0.9, ls=(0, (5, 2)))
            end: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
            axes.annotate(f"{keep:.4g} asked", (1, 100 * keep), xytext=(-2, 3), **end)
        for row in rows:
            if row["id"] == result["chosen"]:
                axes.plot([row["ms"], row["ms"]], [100 * row["bound"], 100 * row["kept"]], color=INK, lw=2)
                axes.annotate(row["id"], (row["ms"], 100 * row["kept"]), xytext=(6, 7), textcoords="offset points", weight="bold")
        model, place_ = result["model"]["name"], result["environment"]
        axes.set_title(f"{result['task']} on {model}, {place_['device']} ({place_['cpu']})", fontsize=9, loc="left")
        axes.set(xlabel="measured time to the first token, ms per question (faster to the right)", ylabel="right answers kept, %")
        axes.invert_xaxis()
        axes.legend(fontsize=8, frameon=False, loc="lower left", title="large: tested; bar: down to its 95 % bound", title_fontsize=7.5)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def _front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """From cheap to dear, each keeping more than all cheaper ones."""
    out: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["ms"], -row["kept"])):
        if not out or row["kept"] > out[-1]["kept"]:
            out.append(row)
    return out
