"""EVS: released counts."""

from __future__ import annotations

import pytest

import duet_vlm


def test_evs_counts_as_released() -> None:
    assert duet_vlm.get_method("evs").official(0.9).plan(400, 2, None).entry == 39  # type: ignore[attr-defined]
    assert duet_vlm.get_method("frames")(keep=0.1).plan(400, 2, None).entry == 40
    with pytest.raises(ValueError, match=r"pruned=1.0: the share of tokens that leave"):
        duet_vlm.get_method("evs").official(1.0)  # type: ignore[attr-defined]
