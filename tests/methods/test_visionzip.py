"""VisionZip: the released choice at the edges that no recording reaches, and refused settings."""

from __future__ import annotations

import pytest
from method_views import EDGES, check_released_choice

from duet_vlm.methods.encoder.visionzip import VisionZip


# the released code divides by contextual
@pytest.mark.parametrize(("dominant", "contextual"), [edge[:2] for edge in EDGES if edge[1]])
def test_released_choice_at_the_edges(dominant: int, contextual: int) -> None:
    check_released_choice(VisionZip.official(dominant, contextual), dominant, contextual, None)


def test_settings_that_the_released_code_cannot_run_are_refused() -> None:
    with pytest.raises(ValueError, match="CLS row counts"):
        VisionZip.official(0, 3)
