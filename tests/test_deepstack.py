"""Rows that an encoder adds behind the first decoder layers follow the survivors, whatever layer drops (Qwen3-VL: three
levels)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CLIPS, FAMILIES, MIXED, build, forward, generate, shared
from reference_forward import choices_of, step_logits, walk_batch

import duet_vlm

DROPS = {  # layers 0 to 3: in front of, among and behind the layers that rows are added to
    "before every level": {"dominant": 1.0, "contextual": 0, "schedule": ((0, 0.5),)},
    "between levels": {"dominant": 0.6, "contextual": 0.2, "schedule": ((1, 0.6), (2, 0.3))},
    "everything, between levels": {"dominant": 1.0, "contextual": 0, "schedule": ((1, 0.5), (2, 0.0))},
    "behind the last level": {"dominant": 0.6, "contextual": 0.2, "schedule": ((3, 0.5),)},
}


@pytest.mark.parametrize("rows", [MIXED, CLIPS], ids=["images", "clips"])
@pytest.mark.parametrize("settings", DROPS.values(), ids=DROPS.keys())
def test_added_rows_follow_the_survivors(settings: dict[str, Any], rows: Any) -> None:
    model, inputs = shared("qwen3_vl"), FAMILIES["qwen3_vl"].inputs(rows)
    with duet_vlm.attach(model, "duet", **settings) as handle:
        result = generate(model, inputs)
        choices = choices_of(handle)
    new = result.sequences[:, inputs["input_ids"].shape[1] :]
    oracle = shared("qwen3_vl", "eager")
    expected = step_logits(walk_batch(oracle, inputs, choices, new), choices, len(result.logits))
    for ours, wanted in zip(result.logits, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=2e-4)


def test_the_added_rows_matter() -> None:
    """What the tests above hold is no zero: without the added rows the same survivors give other logits."""
    model, inputs = build("qwen3_vl"), FAMILIES["qwen3_vl"].inputs(MIXED)
    settings = DROPS["between levels"]
    with duet_vlm.attach(model, "duet", **settings):
        logits = forward(model, inputs).logits
    for merger in model.model.visual.deepstack_merger_list:
        torch.nn.init.zeros_(merger.linear_fc2.weight)
        torch.nn.init.zeros_(merger.linear_fc2.bias)
    with duet_vlm.attach(model, "duet", **settings):
        assert float((forward(model, inputs).logits - logits).abs().max()) > 0.5
