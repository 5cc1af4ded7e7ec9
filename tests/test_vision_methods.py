"""Methods with several vision layers, crops, the question or the projector: what all refuse, half precision, gradients."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, ONE, TWO, build, forward, shared
from torch import Tensor

import duet_vlm


def test_settings_out_of_range_are_refused() -> None:
    for method, settings, message in (
        ("hired", {"alpha": 1.5}, "alpha=1.5: the overview's share"),
        ("hired", {"early": 9, "keep": 4}, "signal_layer=9: this vision tower has no such layer"),
        ("holov", {"num_crops": 0}, "num_crops=0"),
        ("vscan", {"window": 0}, "window=0"),
        ("zoo_prune", {"directions": 0}, "directions=0"),
        ("zoo_prune", {"step": 0.0}, "step=0.0"),
        ("cdpruner", {"relevance": "clip"}, "choose one of 'decoder', 'contrastive'"),
    ):
        with pytest.raises(ValueError, match=message):
            duet_vlm.attach(shared("llava"), method, **settings)


@pytest.mark.parametrize("method", ["hired", "vscan", "holov", "prunesid", "cdpruner", "zoo_prune"])
def test_half_precision_and_gradients(method: str) -> None:
    """bfloat16 runs; in training the loss reaches the projector, and the choice carries none."""
    settings = {"keep": 0.4} | ({"directions": 2} if method == "zoo_prune" else {})
    model = build("llava", dtype=torch.bfloat16)
    inputs = FAMILIES["llava"].inputs([ONE, TWO])
    with duet_vlm.attach(model, method, **settings) as handle:
        forward(model, inputs | {"pixel_values": inputs["pixel_values"].bfloat16()})
        assert handle.report().measured[0] < 36
    model = build("llava").train()
    with duet_vlm.attach(model, method, **settings):
        model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] > 20, -100)).loss.backward()
    grad: Tensor = model.model.multi_modal_projector.linear_1.weight.grad
    assert grad is not None and float(grad.abs().sum()) > 0
