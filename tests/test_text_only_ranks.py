"""Text-only batches of a distributed run: the blank image reaches every parameter and changes nothing (processes:
test_distributed.py)."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, ONE, TEXT, build

import duet_vlm
from duet_vlm.runtime.training import distributed


@pytest.mark.parametrize("method", ["none", "duet", "duet_plus"])
@pytest.mark.parametrize("family", FAMILIES)
def test_blank_image_reaches_every_parameter_and_changes_nothing(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build(family).train(), FAMILIES[family].inputs([TEXT, TEXT])
    labels = inputs["input_ids"]
    stock = model(**inputs, labels=labels)
    stock.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    model.zero_grad()
    with duet_vlm.attach(model, method, **({} if method == "none" else {"budget": 0.3})):
        assert torch.equal(model(**inputs, labels=labels).logits, stock.logits)
        model.zero_grad()
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        output = model(**inputs, labels=labels)
        output.loss.backward()
    assert torch.equal(output.logits, stock.logits)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, grad in expected.items():
        assert torch.equal(got[name], grad), name
    reached = idle & set(got)
    assert all(not got[name].any() for name in reached)
    # LLaVA reads the layer before the last: stock models leave what follows idle on pictures, too
    never = idle - reached
    with_picture = build(family).train()
    picture = FAMILIES[family].inputs([ONE])
    with_picture(**picture, labels=picture["input_ids"].masked_fill(picture["input_ids"] != 9, -100)).loss.backward()
    assert never == {name for name, p in with_picture.named_parameters() if p.grad is None}


def test_alone_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llava").train()
    assert not distributed.needs_rank_sync(model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert not distributed.needs_rank_sync(model)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert distributed.needs_rank_sync(model)
    assert not distributed.needs_rank_sync(model.eval())  # replicas that only answer do not wait for each other
