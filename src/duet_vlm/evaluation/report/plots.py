"""Plots of a result. Cheaper is to the right, better is up. The same file gives the same bytes."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from duet_vlm.evaluation.drop_curve import curve_of
from duet_vlm.evaluation.report import columns
from duet_vlm.evaluation.report.columns import Run, at
from duet_vlm.evaluation.report.style import FLOORS, ORACLE, Look, apart, looks, plain
from duet_vlm.viz.colors import COLOURS, GRID, GROUND, INK, MUTED, RC

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# in inches: the area of the lines, the room to its left, between its right edge and the labels, per letter of a label,
# between two labels
AREA, LEFT, BETWEEN, LETTER, LINE = 5.4, 0.7, 0.62, 0.073, 0.185
NEAR = 3.0  # percentage points around the full model within which the scale is about linear
WIDTH = 8.6  # of a plot, at least
# methods that are named have a colour of their own; the others are in the table
REFERENCES, MOST = FLOORS | {ORACLE}, len(COLOURS)
PIXELS = 160  # per inch, of the PNG
# ticks, the roundest first; less round ones only until there are enough
STEPS, DIGITS, ENOUGH = (10, 5, 1, 0.5, 0.1), ((1, 2, 5), (3, 4, 6, 8, 1.5), (7, 9, 1.2, 2.5)), 10


def all_plots(
    result: dict[str, Any], say: Callable[[str], None] = lambda caption: None
) -> dict[str, tuple[str, bytes, bytes]]:
    """name -> (caption, PNG, SVG). Plots without data (no timing) are absent. ``say`` is called with the next plot's
    name.

    Raises
    ------
    ImportError
        Without matplotlib, saying how to get it.
    """
    try:
        from matplotlib import style
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install ".[viz]" in your clone of duet-vlm') from error
    makers: dict[str, tuple[str, Callable[[dict[str, Any]], Figure | None]]] = {
        "drops": ("Accuracy without visual tokens from a layer on", without_tokens),
        "tokens": ("Accuracy kept against measured visual tokens", kept_against_tokens),
        "time": ("Accuracy against measured prefill time", accuracy_against_time),
        "kinds": ("Accuracy kept, by kind of question", by_kind),
    }
    out = {}
    for name, (caption, make) in makers.items():
        say(caption)
        with style.context(RC, after_reset=True), _quiet():  # nothing of a personal matplotlibrc
            figure = make(result)
            if figure is not None:
                out[name] = caption, _bytes(figure, "png"), _bytes(figure, "svg")
    return out


def without_tokens(result: dict[str, Any]) -> Figure | None:
    """The drop curve: accuracy over the layer from which on there is no visual token, all questions and kind by kind."""
    curve = curve_of(result)
    if curve is None:
        return None
    longest = max(len(plain(kind)) for kind in curve.kinds)
    figure, axes = _figure(
        max(WIDTH, LEFT + AREA + BETWEEN + LETTER * longest), max(4.6, 1.0 + LINE * len(curve.kinds))
    )
    layers = [*(point.layer for point in curve.points), curve.depth]
    styles, ends = looks(dict.fromkeys(curve.kinds, "")), []
    if len(curve.kinds) > 1:
        for kind, full in curve.kinds.items():
            heights, look = (
                [100 * value for value in (*(point.kinds[kind] for point in curve.points), full)],
                styles[kind],
            )
            axes.plot(
                layers,
                heights,
                color=look.colour,
                ls=look.dash,
                lw=1.0,
                marker=look.marker,
                ms=3.5,
                mec=GROUND,
                mew=0.5,
                alpha=0.8,
            )
            ends.append((kind, float(curve.depth), heights[-1]))
    heights = [100 * value for value in (*(point.accuracy for point in curve.points), curve.full)]
    low, high = (
        [100 * min(1.0, curve.full + point.interval[edge]) for point in curve.points] + [100 * curve.full]
        for edge in (0, 1)
    )
    axes.fill_between(layers, low, high, color=INK, alpha=0.15, lw=0, zorder=3)
    axes.plot(
        layers, heights, color=INK, lw=2.0, marker="D", ms=4.5, mec=GROUND, mew=0.6, zorder=4, label="all questions"
    )
    axes.axhline(100 * curve.full, color=INK, lw=0.8, zorder=1)
    axes.set(
        xlabel=f"no visual token from this layer on (right end: the full model, {curve.depth} layers)",
        ylabel="accuracy, %",
    )
    axes.legend(fontsize=8.5, frameon=False, loc="lower right")
    _names(figure, axes, ends, styles)
    return figure


def kept_against_tokens(result: dict[str, Any]) -> Figure | None:
    """One line per label: accuracy kept (% of the full model's) over the mean tokens that were measured."""
    full = result["runs"][0]

    def point(run: Run) -> list[float] | None:
        x, kept = run["tokens"]["measured"], run.get("kept")
        if kept is None:
            return None
        low, high = run.get("kept_interval") or (kept, kept)
        return [x, x, x, 100 * kept, 100 * low, 100 * high]

    return _lines(
        result,
        point,
        anchor=(full["tokens"]["measured"], 100.0),
        x_label="measured visual tokens per decoder layer, mean per question (log scale, fewer to the right)",
        y_label="accuracy kept, % of the full model's (stretched near 100)",
    )


def accuracy_against_time(result: dict[str, Any]) -> Figure | None:
    """One line per label: accuracy over the prefill time that was measured; None if nothing was timed."""
    full = result["runs"][0]
    if at(full, "prefill", "ms") is None:
        return None

    def point(run: Run) -> list[float] | None:
        time, (low, high) = run.get("prefill"), run["interval"]
        return (
            None
            if time is None
            else [time["ms"], time["low"], time["high"], 100 * run["accuracy"], 100 * low, 100 * high]
        )

    return _lines(
        result,
        point,
        anchor=(full["prefill"]["ms"], 100 * full["accuracy"]),
        x_label="measured prefill time, ms per question (log scale, faster to the right; bars: quartiles)",
        y_label="accuracy, % (stretched near the full model's)",
    )


def _lines(
    result: dict[str, Any],
    point: Callable[[Run], list[float] | None],
    anchor: tuple[float, float],
    x_label: str,
    y_label: str,
) -> Figure | None:
    """``point`` gives [x, x low, x high, y, y low, y high] of a run; ``anchor`` is the full model's (x, y)."""
    series: dict[str, list[list[float]]] = {}
    methods = {run["label"]: run["method"] for run in result["runs"][1:]}
    for run in columns.ordered(result)[1:]:  # a line goes from large to small budgets
        if run["status"] == "ok" and (marker := point(run)):
            series.setdefault(run["label"], []).append(marker)
    if not series:
        return None
    told = {
        *columns.leaders(result, REFERENCES, MOST),
        *(label for label in series if methods[label] in REFERENCES),
    } & series.keys()
    longest = max(len(plain(label)) for label in told)
    figure, axes = _figure(max(WIDTH, LEFT + AREA + BETWEEN + LETTER * longest), max(4.6, 1.0 + LINE * len(told)))
    _scales(
        axes,
        [anchor[0], *(p[i] for s in series.values() for p in s for i in range(3))],
        [anchor[1], *_heights(series)],
        anchor[1],
    )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.axhline(anchor[1], color=INK, lw=0.8, zorder=1)
    axes.plot(*anchor, marker="D", ms=6, color=INK, mec=GROUND, mew=0.8, zorder=5, clip_on=False)
    axes.annotate("full model", anchor, xytext=(2, 6), textcoords="offset points", fontsize=8.5, color=INK)
    styles = looks({label: methods[label] for label in series if label in told})
    ends = []
    for label, points in series.items():
        if label in told:
            _line(axes, points, styles[label])
            ends.append((label, points[-1][0], points[-1][3]))
        else:
            axes.plot([p[0] for p in points], [p[3] for p in points], color=MUTED, lw=0.8, alpha=0.3, zorder=1.5)
    if others := len(series) - len(told):
        axes.text(
            0.01,
            0.01,
            f"thin and grey: {others} other methods, named in the table",
            transform=axes.transAxes,
            fontsize=8.5,
            color=MUTED,
        )
    _names(figure, axes, ends, styles)
    return figure


def _heights(series: dict[str, list[list[float]]]) -> Iterator[float]:
    return (p[i] for points in series.values() for p in points for i in range(3, 6))


def _line(axes: Axes, points: list[list[float]], look: Look) -> None:
    x, x_low, x_high, y, low, high = map(list, zip(*points, strict=True))
    bars: dict[str, Any] = {"xerr": _around(x, x_low, x_high), "yerr": _around(y, low, high)}
    axes.errorbar(x, y, **bars, fmt="none", ecolor=look.colour, elinewidth=0.8, alpha=0.55, zorder=look.order)
    inside = look.colour if look.filled else GROUND
    edge = GROUND if look.filled else look.colour
    axes.plot(x, y, color=look.colour, ls=look.dash, lw=look.width, zorder=look.order)
    axes.plot(x, y, ls="", marker=look.marker, ms=look.size, color=inside, mec=edge, mew=0.7, zorder=look.order + 0.5)


def _around(middle: list[float], low: list[float], high: list[float]) -> list[list[float]]:
    """Distances below and above, in the form of error bars."""
    below = [max(0.0, m - edge) for m, edge in zip(middle, low, strict=True)]
    above = [max(0.0, edge - m) for m, edge in zip(middle, high, strict=True)]
    return [below, above]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((LEFT / width, 0.52 / height, AREA / width, 1 - 0.70 / height))
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3)
    return figure, axes


def _scales(axes: Axes, xs: list[float], ys: list[float], anchor: float) -> None:
    """x: logarithmic, large values left. y: linear near ``anchor``, ever denser away from it, so that small losses can
    be told apart."""
    import numpy as np
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    def stretched(y: Any) -> Any:
        return np.arcsinh((y - anchor) / NEAR)

    axes.set_xscale("log")
    left, right = max(xs) * 1.12, min(xs) / 1.08
    axes.set_xlim(left, right)
    decades = range(math.floor(math.log10(right)), math.ceil(math.log10(left)))
    wanted = [[digit * 10.0**decade for digit in digits for decade in decades] for digits in DIGITS]
    axes.xaxis.set_major_locator(FixedLocator(_spaced(wanted, math.log, right, left, 0.06)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("function", functions=(stretched, lambda y: NEAR * np.sinh(y) + anchor))
    low, high = stretched(min(ys)), stretched(max(ys))
    room = 0.05 * max(high - low, 0.5)
    bottom, top = (float(NEAR * np.sinh(edge) + anchor) for edge in (low - room, high + room))
    axes.set_ylim(bottom, top)
    near = [sorted((step * i for i in range(int(110 / step) + 1)), key=lambda y: abs(y - anchor)) for step in STEPS]
    axes.yaxis.set_major_locator(FixedLocator(_spaced(near, stretched, bottom, top, 0.05)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _spaced(
    wanted: list[list[float]], scale: Callable[[float], float], low: float, high: float, gap: float
) -> list[float]:
    """Of the ``candidates`` ticks, rank by rank until there are enough, those within [low, high] that keep ``gap`` axis
    lengths from the ones before."""
    least = gap * (scale(high) - scale(low))
    out: list[float] = []
    for rank in wanted:
        if len(out) < ENOUGH:
            for tick in rank:
                if low <= tick <= high and all(abs(scale(tick) - scale(other)) >= least for other in out):
                    out.append(tick)
    return out


def _names(figure: Figure, axes: Axes, ends: list[tuple[str, float, float]], styles: dict[str, Look]) -> None:
    """Labels to the right of the lines' ends, spread so that none covers another, each tied to its line."""
    from matplotlib.lines import Line2D

    to_axes = axes.transData + axes.transAxes.inverted()
    figure.canvas.draw()
    starts = [to_axes.transform((x, y)) for _, x, y in ends]
    gap = LINE / (axes.get_position().height * figure.get_figheight())
    places = apart([float(y) for _, y in starts], gap, 0.0, 1.0)
    for (label, _, _), (x, y), target in zip(ends, starts, places, strict=True):
        look = styles[label]
        leader = Line2D(
            [x, 1.035, 1.05],
            [y, target, target],
            transform=axes.transAxes,
            color=look.colour,
            lw=0.6,
            alpha=0.5,
            clip_on=False,
            zorder=1,
        )
        sample = Line2D(
            [1.05, 1.10],
            [target, target],
            transform=axes.transAxes,
            color=look.colour,
            ls=look.dash,
            lw=look.width,
            clip_on=False,
        )
        mark = Line2D(
            [1.075], [target], transform=axes.transAxes, ls="", marker=look.marker, ms=look.size, clip_on=False
        )
        mark.set(
            color=look.colour if look.filled else GROUND,
            markeredgecolor=GROUND if look.filled else look.colour,
            markeredgewidth=0.7,
        )
        for artist in (leader, sample, mark):
            axes.add_artist(artist)
        axes.text(1.115, target, plain(label), transform=axes.transAxes, va="center_baseline", fontsize=8.5, color=INK)


def by_kind(result: dict[str, Any]) -> Figure | None:
    """Rows are runs, columns kinds; a cell shows the share kept of the full model's accuracy, and is the darker the
    more is lost."""
    kinds, (full, *runs) = columns.kinds(result), columns.ordered(result)
    if not kinds or not runs:
        return None
    rows = list(_grouped(runs))
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    left = 0.25 + LETTER * max(len(plain(run["label"])) for run in runs)
    row, head = 0.235, 0.62
    wide = min(1.0, max(0.74, (WIDTH - left - 0.1) / len(kinds)))
    height = head + row * (rows[-1][0] + 1) + 0.12
    figure = Figure(figsize=(left + wide * len(kinds) + 0.1, height))
    FigureCanvasAgg(figure)
    size = figure.get_figwidth()
    axes = figure.add_axes((left / size, 0.12 / height, wide * len(kinds) / size, 1 - (head + 0.12) / height))
    axes.set(xlim=(0, len(kinds)), ylim=(rows[-1][0] + 1, 0))
    axes.set_axis_off()
    for x, kind in enumerate(kinds):
        axes.text(x + 0.5, -0.95, plain(kind), ha="center", va="bottom", fontsize=8.5)
        axes.text(
            x + 0.5,
            -0.75,
            f"full {full['kinds'][kind]['accuracy']:.3f}",
            ha="center",
            va="top",
            fontsize=7.5,
            color=MUTED,
        )
    for y, run, group in rows:
        if run is None:
            axes.text(-0.1, y + 0.62, group, ha="right", va="center_baseline", fontsize=8.5, weight="bold")
            continue
        axes.text(-0.1, y + 0.5, plain(run["label"]), ha="right", va="center_baseline", fontsize=8.5)
        _row(axes, y, run, kinds)
    return figure


def _grouped(runs: list[Run]) -> Iterator[tuple[float, Run | None, str]]:
    """(height, run or None for a headline, headline) from the top; a headline opens every budget."""
    height, last = 0.0, None
    for number, run in enumerate(runs):
        group = columns.budget(run["budget"]) or "own settings"
        if group != last:
            height += 0.25 if number else 0.0
            yield height, None, group
            height, last = height + 1.1, group
        yield height, run, group
        height += 1


def _row(axes: Axes, y: float, run: Run, kinds: list[str]) -> None:
    from matplotlib.patches import Rectangle

    if run["status"] != "ok":
        axes.add_patch(
            Rectangle((0, y + 0.04), len(kinds), 0.92, facecolor="none", edgecolor=GRID, hatch="////", lw=0.6)
        )
        axes.text(
            len(kinds) / 2,
            y + 0.5,
            plain(columns.refusal(run)),
            ha="center",
            va="center_baseline",
            fontsize=8,
            color=INK,
            backgroundcolor=GROUND,
        ).get_bbox_patch().set(boxstyle="square,pad=0.15")  # type: ignore[union-attr]
        return
    for x, kind in enumerate(kinds):
        kept = at(run, "kinds", kind, "kept")
        if kept is None:
            axes.text(x + 0.5, y + 0.5, columns.NOTHING, ha="center", va="center_baseline", fontsize=8, color=MUTED)
            continue
        fill, text = shade(kept)
        axes.add_patch(Rectangle((x + 0.02, y + 0.04), 0.96, 0.92, facecolor=fill, lw=0))
        axes.text(x + 0.5, y + 0.5, columns.percent(kept), ha="center", va="center_baseline", fontsize=8, color=text)


def darkness(kept: float) -> float:
    """0 where nothing is lost, 1 where half of the accuracy or more is; steep at the beginning, as the lines' scale is."""
    return min(1.0, math.asinh(max(0.0, 100 * (1 - kept))) / math.asinh(50))


def shade(kept: float) -> tuple[str, str]:
    """Colours of a cell and of its text: one hue, lightness falling with the loss; the text black or white, whichever
    has more contrast."""
    stops = ((0.0, (244, 241, 234)), (0.35, (250, 208, 146)), (0.7, (214, 105, 40)), (1.0, (94, 24, 20)))
    dark = darkness(kept)
    (start, near), (end, far) = next((a, b) for a, b in zip(stops, stops[1:], strict=False) if dark <= b[0])
    part = (dark - start) / (end - start)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(near, far, strict=True))
    luminance = sum(
        weight * (value / 255) ** 2.2
        for weight, value in zip((0.2126, 0.7152, 0.0722), (red, green, blue), strict=True)
    )
    return f"#{red:02x}{green:02x}{blue:02x}", "#ffffff" if luminance < 0.179 else "#000000"


@contextmanager
def _quiet() -> Iterator[None]:
    """A label in a script that the font lacks is drawn as boxes; that is no reason to warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support .* natively")
        yield


def _bytes(figure: Figure, form: str) -> bytes:
    """The figure as a file, without date or version in it."""
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Software": None} if form == "png" else {"Date": None, "Creator": None}
    figure.savefig(buffer, format=form, dpi=PIXELS, metadata=metadata)
    return buffer.getvalue()
