"""The drop curve: accuracy when all visual tokens are dropped before one layer, and the schedules that follow from it.

No choice among tokens is made here, so the curve is a property of the model and the questions alone: where it is flat,
tokens are no longer used, and a method that drops them there loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import duet_vlm
from duet_vlm.evaluation.statistics import falling
from duet_vlm.planning.budget import Schedule

METHOD = "duet"  # with a schedule and nothing else: all tokens enter
FULL = "full model"
LABEL = "none from layer "
SLEPT = "asleep in layers "
POINTS = 12  # layers that are measured where nobody says which
TOLERANCE = 0.01
PAPER, DEEP = "paper", "deep"
LEVELS = (0.6, 0.3, 0.1)  # of the entering tokens, kept from one layer on each
Cells = tuple[dict[str, Any], ...]


def duet_schedule(depth: int) -> Schedule:
    """DUET's own drops."""
    made: Any = duet_vlm.get_method("duet")()
    schedule: Schedule = made.with_paper_schedule(depth).schedule
    return schedule


def deep_schedule(depth: int) -> Schedule:
    """Four drops, the first of them early ([8, 14, 22, 28] of 32 layers): 2.2 times the budget enters, where DUET's
    lets 1.6 times enter."""
    return tuple(
        {
            max(1, depth // 4): 0.6,
            max(1, 7 * depth // 16): 0.3,
            max(1, 11 * depth // 16): 0.1,
            7 * depth // 8: 0.0,
        }.items()
    )


# by depth alone: they ask for no curve
FIXED: dict[str, Callable[[int], Schedule]] = {PAPER: duet_schedule, DEEP: deep_schedule}


@dataclass(frozen=True)
class CurvePoint:
    """Result without any visual token from one layer on.

    Attributes
    ----------
    layer : int
        The layer before which all visual tokens are dropped.
    accuracy, difference : float
        Accuracy, and its difference to the full model.
    interval : (float, float)
        Paired 95 % interval of the difference.
    kinds : dict of str to float
        Accuracy by kind of question.
    """

    layer: int
    accuracy: float
    difference: float
    interval: tuple[float, float]
    kinds: dict[str, float]


@dataclass(frozen=True)
class DropCurve:
    """Points by layer, of a decoder of ``depth`` layers; ``full`` is the full model's accuracy, ``kinds`` that by kind."""

    depth: int
    full: float
    kinds: dict[str, float]
    points: tuple[CurvePoint, ...]

    def needed_until(self, tolerance: float = TOLERANCE) -> int:
        """The first measured layer from which on at most ``tolerance`` of accuracy is lost anywhere; the depth where
        there is none."""
        first = self.depth
        for point in reversed(self.points):
            if point.difference < -tolerance:
                break
            first = point.layer
        return first

    def needs(self) -> list[float]:
        """Share of the visual information still needed at the input of each layer, in [0, 1] and never rising.

        Of the accuracy that is lost without any image (at the first layer measured), the part that is lost without one
        from that layer on; between measured layers a straight line.
        """
        lost = falling(np.array([max(0.0, -point.difference) for point in self.points]))
        layers = np.array([0, *(point.layer for point in self.points), self.depth])
        most = float(lost[0]) if len(lost) else 0.0
        share = np.array([1.0, *(lost / most if most else np.zeros(len(lost))), 0.0])
        return [float(value) for value in np.interp(np.arange(self.depth), layers, share)]


def layers_of(depth: int, wanted: Sequence[int] = ()) -> tuple[int, ...]:
    """The layers to measure: ``requested`` if given, else all, or ``POINTS`` spread over a deep decoder.

    Raises
    ------
    ValueError
        Layers that the decoder does not have, or the first one, before which no visual token was used.
    """
    wrong = [layer for layer in wanted if not 1 <= layer < depth]
    if wrong:
        raise ValueError(f"--layers {wrong[0]}: the decoder has {depth} layers: give numbers from 1 to {depth - 1}")
    if wanted:
        return tuple(sorted(set(wanted)))
    return tuple(sorted({round(layer) for layer in np.linspace(1, depth - 1, min(POINTS, depth - 1)).tolist()}))


def drops(layers: Sequence[int]) -> Cells:
    """The runs of an experiment (tested against ``FULL``) that measures the curve."""
    return tuple(
        {"method": METHOD, "settings": {"schedule": [[layer, 0.0]]}, "label": f"{LABEL}{layer}"} for layer in layers
    )


def sleeps(layers: Sequence[int], depth: int, gap: int) -> Cells:
    """The runs in which all visual tokens sleep for ``gap`` layers from one on, and come back with the states that they
    had: where nothing is lost that dropping them there loses, stale states serve.

    Raises
    ------
    ValueError
        A gap after which no layer is left in which they could come back.
    """
    behind = [layer for layer in layers if layer + gap < depth]
    if gap < 1 or not behind:
        raise ValueError(
            f"--asleep {gap}: of {depth} layers, give 1 to {depth - 1 - min(layers)} from layer {min(layers)} on"
        )
    return tuple(
        {
            "method": METHOD,
            "settings": {"schedule": [[layer, 0.0], [layer + gap, 1.0]], "options": {"reentry": "stage"}},
            "label": f"{SLEPT}{layer} to {layer + gap - 1}",
        }
        for layer in behind
    )


def slept(result: dict[str, Any]) -> tuple[CurvePoint, ...]:
    """Points of the runs in which tokens slept, by the first layer of the gap; empty where a result has none."""
    rows = [row for row in result["runs"][1:] if row["label"].startswith(SLEPT) and row["status"] == "ok"]
    return tuple(sorted((_point(row) for row in rows), key=lambda point: point.layer))


def curve_of(result: dict[str, Any]) -> DropCurve | None:
    """The curve of a result, None if the result has none."""
    full, *rows = result["runs"]
    points = [_point(row) for row in rows if _measures(row)]
    if not points or "layers" not in result["model"]:
        return None
    whole = {kind: each["accuracy"] for kind, each in full["kinds"].items()}
    return DropCurve(
        result["model"]["layers"], full["accuracy"], whole, tuple(sorted(points, key=lambda point: point.layer))
    )


def _measures(row: dict[str, Any]) -> bool:
    """True if a row is a point of the curve, not only labelled like one."""
    if not row["label"].startswith(LABEL) or row["status"] != "ok" or not row.get("against"):
        return False
    stages: list[Any] = row["settings"].get("schedule") or []
    return row["method"] == METHOD and len(stages) == 1 and not stages[0][1]


def _point(row: dict[str, Any]) -> CurvePoint:
    kinds, against = {kind: by_kind["accuracy"] for kind, by_kind in row["kinds"].items()}, row["against"]
    return CurvePoint(
        row["settings"]["schedule"][0][0], row["accuracy"], against["difference"], tuple(against["interval"]), kinds
    )


def proposals(curve: DropCurve, tolerance: float = TOLERANCE) -> dict[str, Schedule]:
    """Schedules that the curve suggests, by name.

    ``cut`` keeps everything until nothing is needed any more. ``as needed`` keeps 60, 30, 10 % of the entering tokens
    as soon as no more than that share is still needed, ``slower`` as soon as its root is no more than that; both drop
    the rest where ``cut`` does.
    """
    end, needs = curve.needed_until(tolerance), curve.needs()
    cut: dict[int, float] = {} if end == curve.depth else {end: 0.0}

    def stages(power: float) -> Schedule:
        accuracy: dict[int, float] = {}
        for level in LEVELS:
            layer = next((layer for layer, need in enumerate(needs) if layer and need**power <= level), curve.depth)
            if layer < end:
                accuracy[layer] = level
        return tuple((accuracy | cut).items())

    return {"cut": tuple(cut.items()), "as needed": stages(1.0), "slower": stages(0.5)}


def check_takes_schedules(method: str, depth: int) -> None:
    """Refuse, before hours of measuring, a method that takes no schedule beside a budget."""
    made: Any = duet_vlm.get_method(method)  # whose settings are its own
    try:
        made(schedule=((depth - 1, 0.0),)).plan(1000, depth, 0.5)
    except duet_vlm.BudgetError:
        return
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--method {method}: takes no schedule beside a budget, as duet_plus does ({error})"
        ) from error


def contest(curve: DropCurve, method: str, budgets: Sequence[float | int], tolerance: float = TOLERANCE) -> Cells:
    """The deciding runs: ``method`` at each budget with every suggested schedule, and with the two fixed ones."""
    schedules: dict[Schedule, str] = {}
    for name, schedule in {
        **{name: fixed(curve.depth) for name, fixed in FIXED.items()},
        **proposals(curve, tolerance),
    }.items():
        schedules.setdefault(schedule, name)
    return tuple(
        {
            "method": method,
            "budgets": list(budgets),
            "settings": {"schedule": [list(stage) for stage in schedule]},
            "label": name,
        }
        for schedule, name in schedules.items()
    )


def winners(result: dict[str, Any]) -> dict[float | int, dict[str, Any]]:
    """The best row at each budget; of equals the first one, so a fixed schedule is kept unless another is better."""
    best: dict[float | int, dict[str, Any]] = {}
    for row in result["runs"][1:]:
        if row["status"] == "ok" and (row["budget"] not in best or row["accuracy"] > best[row["budget"]]["accuracy"]):
            best[row["budget"]] = row
    return best
