"""align=True: the decoder's output lines up with the prompt again, so losses and metrics written for the stock model
are right."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, MIXED, TWO, generate, shared
from method_matrix import Case, matrix
from test_training import labels_of, survivors_loss
from torch.nn.functional import cross_entropy

import duet_vlm


def stock_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Every row predicts the next slot's label, as any trainer writes it."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@matrix("duet", "fastv", "pyramiddrop", side=("left", "right"))
def test_rows_are_those_of_the_survivors(case: Case, side: str) -> None:
    model, inputs = case.model(), FAMILIES[case.family].inputs((*MIXED, TWO), side)
    labels = labels_of(inputs)
    with case.attach() as handle, torch.no_grad():
        plain = model(**inputs, labels=labels)
        slots = handle.slots
        expected, _ = survivors_loss(plain.logits, slots, labels)
    with case.attach(align=True) as handle, torch.no_grad():
        output = model(**inputs, labels=labels)
        assert torch.equal(handle.slots, slots)
        hidden = model.model(**inputs).last_hidden_state
    assert output.logits.shape[:2] == inputs["input_ids"].shape == hidden.shape[:2]
    for row, places, short in zip(output.logits, slots.tolist(), plain.logits, strict=True):
        for j, slot in enumerate(places):
            after = next((s for s in places[j + 1 :] if s >= 0), len(row))
            if slot >= 0:
                torch.testing.assert_close(row[slot:after], short[j].expand(after - slot, -1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stock_loss(output.logits, labels), expected)
    torch.testing.assert_close(output.loss, expected)


@matrix("duet", attention=("sdpa",))
def test_gradients_and_generation_do_not_change(case: Case) -> None:
    inputs = FAMILIES[case.family].inputs(MIXED)
    labels, grads, texts = labels_of(inputs), [], []
    for align in (False, True):
        model = case.fresh()
        with case.attach(model, align=align):
            model(**inputs, labels=labels).loss.backward()
            texts.append(generate(model, inputs).sequences)
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(*texts)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_happens_where_nothing_is_dropped(family: str) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs(MIXED)
    with torch.no_grad():
        expected = model(**inputs).logits
        with duet_vlm.attach(model, "duet", budget=1.0, align=True):
            assert torch.equal(model(**inputs).logits, expected)
