"""DUET: the released choice at the edges that no recording reaches, and refused settings."""

from __future__ import annotations

import pytest
from method_views import EDGES, check_released_choice

from duet_vlm import BudgetError
from duet_vlm.methods.two_stage.duet import Duet


@pytest.mark.parametrize(("dominant", "contextual", "width"), EDGES)
def test_released_choice_at_the_edges(dominant: int, contextual: int, width: int) -> None:
    check_released_choice(Duet.official_llava(dominant, contextual, width, schedule=()), dominant, contextual, width)


def test_settings_that_the_released_code_cannot_run_are_refused() -> None:
    with pytest.raises(ValueError, match="CLS row counts"):
        Duet.official_llava(0, 3)
    with pytest.raises(ValueError, match="at least 1"):
        Duet(dominant=4, contextual=2, cluster_width=0)
    with pytest.raises(BudgetError):
        Duet(schedule=None).plan(16, 8, None)
