"""Gemma 3 as callers outside of generate() run it: the decoder's masks come as a dict, with None where the kernel needs
no mask."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, ONE, TWO, Picture, build, forward, shared
from reference_forward import choices_of, step_logits, walk_batch

import duet_vlm

SHORT = (1, Picture(6, 4, 4), 8)  # everything within the window
# equally many rows, not so many after V2V
UNEVEN = ((1, Picture(6, 4, 4), *range(8, 28)), (1, Picture(7, 4, 4), 9, Picture(8, 4, 4), 11))


@pytest.mark.parametrize("rows", [(SHORT,), (ONE,), (TWO,), UNEVEN], ids=["short", "one", "two", "uneven"])
@pytest.mark.parametrize("method", ["duet", "visionzip", "fastv"])
def test_a_plain_forward_without_token_types(method: str, rows: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock model then looks at images causally."""
    monkeypatch.setattr(
        FAMILIES["gemma3"], "ranks", lambda model, ids, *_: torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    )
    model, inputs = shared("gemma3"), FAMILIES["gemma3"].inputs(rows)
    del inputs["token_type_ids"]
    if rows is UNEVEN:
        assert inputs["attention_mask"].all()
    with duet_vlm.attach(model, method, budget=0.6) as handle:
        found = forward(model, inputs, use_cache=False).logits
        choices = choices_of(handle)
    expected = step_logits(walk_batch(build("gemma3", "eager"), inputs, choices), choices, 1)[0]
    torch.testing.assert_close(found[:, -1], expected, rtol=1e-3, atol=1e-3)
