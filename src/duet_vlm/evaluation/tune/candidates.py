"""The candidates of the search: methods x budgets x schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from duet_vlm.evaluation.drop_curve import FIXED, check_takes_schedules
from duet_vlm.evaluation.experiment import Experiment, ExperimentCell
from duet_vlm.models.lookup import adapter_for

OWN = "own"
SCHEDULES = (OWN, *FIXED)


def candidates(
    methods: Sequence[tuple[str, dict[str, Any]]],
    budgets: Sequence[int | float],
    schedules: Sequence[str],
    model: nn.Module,
) -> list[ExperimentCell]:
    """Every method (its name and settings) at every budget, with its own drops ("own") and with the named schedules
    where it takes one.

    Raises
    ------
    ValueError
        An unknown schedule, or one that none of the methods takes.
    """
    wrong = [name for name in schedules if name not in SCHEDULES]
    if wrong:
        raise ValueError(f"--schedules {wrong[0]}: choose among {', '.join(SCHEDULES)}")
    depth = len(adapter_for(model).layers)
    cells: list[dict[str, Any]] = []
    for method, settings in methods:
        for name in schedules:
            if name == OWN:
                cells.append({"method": method, "budgets": list(budgets), "settings": settings})
            elif _takes_schedules(method, depth):
                drops = [list(stage) for stage in FIXED[name](depth)]
                cells.append(
                    {
                        "method": method,
                        "budgets": list(budgets),
                        "settings": settings | {"schedule": drops},
                        "label": f"{method}, {name}",
                    }
                )
    if not cells:
        names = ", ".join(method for method, _ in methods)
        raise ValueError(
            f"--schedules {','.join(schedules)}: none of {names} takes a schedule beside a budget; add 'own'"
        )
    return Experiment("tune", tuple(cells)).runs()[1:]


def _takes_schedules(method: str, depth: int) -> bool:
    try:
        check_takes_schedules(method, depth)
    except ValueError:
        return False
    return True
