"""After detach the model is exactly what it was, whatever happened in between."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import REDUCING, Case, matrix
from families import FAMILIES, MIXED, Family, build, forward, generate, shared
from oracle import family_of
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

import duet_vlm
from duet_vlm.models.find import adapter_for

HOOKS = [name for name in vars(nn.Module()) if "hook" in name]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Every attribute name, hook, configuration object and shadowed method of every module."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[name, "class"] = type(module)
        state[name, "attributes"] = list(vars(module))
        for hooks in HOOKS:
            registered = getattr(module, hooks)
            state[name, hooks] = list(registered.items()) if hasattr(registered, "items") else registered
        state[name, "config"] = id(getattr(module, "config", None))
        state[name, "callables"] = {key: id(value) for key, value in vars(module).items() if callable(value)}
    state["config values"] = repr(getattr(model, "config", None)), repr(getattr(model, "generation_config", None))
    return state


def warm(family: str, attention: str = "sdpa") -> nn.Module:
    """A fresh model that has run once: transformers puts hooks of its own on modules at the first call."""
    model = build(family, attention)
    generate(model, FAMILIES[family].inputs(MIXED), 2)
    return model


def test_there_are_hooks_to_compare() -> None:
    assert {"_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"} <= set(HOOKS)


class Boom(Exception):
    pass


def boom(*_: Any, **__: Any) -> None:
    raise Boom


PLACES: dict[str, Callable[[Family, nn.Module], nn.Module]] = {
    "decoder layer": lambda family, model: family.text(model).layers[5].mlp,
    "first decoder layer": lambda family, model: family.text(model).layers[0],
    "text model's norm": lambda family, model: family.text(model).norm,
    "head": lambda family, model: model.lm_head,
    "projector": lambda family, model: adapter_for(model).projector(),
    "vision tower": lambda family, model: family.blocks(model)[1],
    "embedding": lambda family, model: model.get_input_embeddings(),
}


@matrix()
def test_detach_leaves_no_trace(case: Case) -> None:
    model, inputs = warm(case.family, case.attention), FAMILIES[case.family].inputs(MIXED)
    before, plain = snapshot(model), forward(model, inputs).logits
    handle = case.attach(model)
    assert snapshot(model) != before
    generate(model, inputs, 3)
    handle.detach()
    assert snapshot(model) == before
    assert torch.equal(forward(model, inputs).logits, plain)
    handle.detach()  # harmless
    assert snapshot(model) == before


@pytest.mark.parametrize("place", PLACES)
@matrix("duet", "fastv", attention=("sdpa",))
def test_an_exception_inside_forward_leaves_no_trace(case: Case, place: str) -> None:
    """The next call of the still attached model is right too: no half-finished call is left behind."""
    model, inputs = warm(case.family, case.attention), FAMILIES[case.family].inputs(MIXED)
    before, plain = snapshot(model), forward(model, inputs).logits
    with case.attach(model) as handle:
        reduced, trace = forward(model, inputs).logits, handle.trace
    for call in (forward, generate):
        with pytest.raises(Boom), case.attach(model):
            bomb = PLACES[place](FAMILIES[case.family], model).register_forward_pre_hook(boom)
            try:
                call(model, inputs)
            finally:
                bomb.remove()
        assert snapshot(model) == before
        assert torch.equal(forward(model, inputs).logits, plain)
    with case.attach(model) as handle:
        bomb = PLACES[place](FAMILIES[case.family], model).register_forward_pre_hook(boom)
        with pytest.raises(Boom):
            forward(model, inputs)
        bomb.remove()
        assert torch.equal(forward(model, inputs).logits, reduced)
        assert handle.trace == trace
        stacks = handle._traffic.stacks
        assert not stacks.calls and not stacks.encoders and not stacks.begun
    assert snapshot(model) == before


class Stop(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise Boom


@matrix("duet", "fastv", attention=("sdpa",))
def test_an_exception_between_decode_steps_leaves_no_trace(case: Case) -> None:
    model, inputs = warm(case.family, case.attention), FAMILIES[case.family].inputs(MIXED)
    before, plain = snapshot(model), forward(model, inputs).logits
    with pytest.raises(Boom), case.attach(model):
        generate(model, inputs, logits_processor=LogitsProcessorList([Stop()]))
    assert snapshot(model) == before
    assert torch.equal(forward(model, inputs).logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_in_the_loss_leaves_no_trace(family: str) -> None:
    model, inputs = warm(family), FAMILIES[family].inputs(MIXED)
    before, plain = snapshot(model), forward(model, inputs).logits
    with pytest.raises(ValueError, match="logits_to_keep"), duet_vlm.attach(model, "duet", **REDUCING["duet"]):
        forward(model, inputs, labels=inputs["input_ids"], logits_to_keep=1)
    assert snapshot(model) == before
    assert torch.equal(forward(model, inputs).logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_own_instance_attributes_come_back(family: str) -> None:
    """A user's patched method and loss are still there afterwards."""
    model, inputs = warm(family), FAMILIES[family].inputs(MIXED)
    plain_features, plain_loss = model.model.get_image_features, model.loss_function
    calls: list[str] = []

    def features(*args: Any, **kwargs: Any) -> Any:
        calls.append("features")
        return plain_features(*args, **kwargs)

    def loss(*args: Any, **kwargs: Any) -> Any:
        calls.append("loss")
        return plain_loss(*args, **kwargs)

    features.__signature__ = inspect.signature(plain_features)  # type: ignore[attr-defined]
    model.model.get_image_features = features
    model.loss_function = loss
    before = snapshot(model)
    with duet_vlm.attach(model, "duet", **REDUCING["duet"]):
        forward(model, inputs, labels=inputs["input_ids"])
        assert calls == ["features", "loss"]
    assert snapshot(model) == before
    assert model.model.get_image_features is features and model.loss_function is loss


def test_other_hooks_stay_where_they_are() -> None:
    model, inputs = build("llava"), FAMILIES["llava"].inputs(MIXED)
    seen: list[int] = []
    layer = model.model.language_model.layers[5]
    early = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    with duet_vlm.attach(model, "duet", **REDUCING["duet"]):
        late = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
        forward(model, inputs)
    rows = list(seen)
    forward(model, inputs)
    assert len(rows) == 2 and rows[1] < rows[0]  # a hook set before ours sees every row, one set after sees the survivors
    assert seen[2:] == [inputs["input_ids"].shape[1]] * 2
    early.remove()
    late.remove()
    assert not layer._forward_pre_hooks


# ---- copies and attaching twice


@pytest.fixture(params=FAMILIES)
def attached(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    model = build(request.param)
    with duet_vlm.attach(model, "duet", **REDUCING["duet"]):
        yield model


def test_deepcopy_of_an_attached_model_is_refused(attached: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"attached.* cannot be copied or pickled: detach\(\) first"):
        copy.deepcopy(attached)


def test_deepcopy_of_a_recorded_tower_is_refused(attached: nn.Module) -> None:
    tower = family_of(attached).tower(attached)
    with pytest.raises(TypeError, match=r"attached.* cannot be copied or pickled: detach\(\) first"):
        copy.deepcopy(tower)


def test_deepcopy_after_detach_is_plain() -> None:
    model, inputs = build("llava"), FAMILIES["llava"].inputs(MIXED)
    plain = forward(model, inputs).logits
    duet_vlm.attach(model, "duet", **REDUCING["duet"]).detach()
    twin = copy.deepcopy(model)
    assert torch.equal(forward(twin, inputs).logits, plain)
    with duet_vlm.attach(twin, "duet", **REDUCING["duet"]):
        assert not torch.equal(forward(twin, inputs).logits[:, -1], plain[:, -1])
        assert torch.equal(forward(model, inputs).logits, plain)  # the original is not touched


def test_attaching_twice_is_refused_and_changes_nothing(attached: nn.Module) -> None:
    before = snapshot(attached)
    with pytest.raises(ValueError, match=r"attached to this model already: detach\(\) its handle first"):
        duet_vlm.attach(attached, "fastv")
    assert snapshot(attached) == before


def test_a_model_can_be_attached_again_after_detach() -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs(MIXED)
    with duet_vlm.attach(model, "duet", **REDUCING["duet"]):
        first = forward(model, inputs).logits
    with duet_vlm.attach(model, "fastv"):
        other = forward(model, inputs).logits
    with duet_vlm.attach(model, "duet", **REDUCING["duet"]):
        assert torch.equal(forward(model, inputs).logits, first)
    assert not torch.equal(other[:, -1], first[:, -1])


def test_set_changes_settings_in_place_and_keeps_the_old_ones_on_error() -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs(MIXED)
    with duet_vlm.attach(model, "duet", budget=12) as handle:
        forward(model, inputs)
        small, logits = handle.report().measured_mean, forward(model, inputs).logits
        with pytest.raises(duet_vlm.BudgetError):
            handle.set(budget=-1)
        assert torch.equal(forward(model, inputs).logits, logits)
        handle.set(budget=20)
        forward(model, inputs)
        assert handle.report().measured_mean > small
