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


def test_a_schedule_is_a_shape_and_a_budget_its_size() -> None:
    """Counted by hand: n tokens for 15 of 30 layers, half of them for 10, none for 5: (15 n + 10 (n // 2)) / 30."""
    for tokens, budget in ((256, 28), (576, 64), (576, 0.33)):
        wanted = budget if isinstance(budget, int) else budget * tokens
        fitting = [n for n in range(1, tokens + 1) if 15 * n + 10 * (n // 2) <= 30 * wanted]
        plan = Duet(schedule=((15, 0.5), (25, 0.0))).plan(tokens, 30, budget)
        assert plan.counts == (max(fitting),) * 15 + (max(fitting) // 2,) * 10 + (0,) * 5
        assert plan.entry == max(fitting) and plan.contextual > 0
    assert Duet(schedule=()).plan(576, 32, 64).counts == (64,) * 32
    assert Duet(schedule=((16, 0.5), (24, 0.0))).plan(576, 32, 64) == Duet().plan(576, 32, 64)
    with pytest.raises(ValueError, match=r"schedule=\(\(16, 30\),\): with a budget give fractions"):
        Duet(schedule=((16, 30),)).plan(576, 32, 64)
    with pytest.raises(ValueError, match="duet: give either budget= or the method's own settings"):
        Duet(dominant=9, schedule=((16, 0.5),)).plan(576, 32, 64)
