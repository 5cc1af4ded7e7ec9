"""After detach the model is exactly what it was, whatever happened in between."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from families import FAMILIES, MIXED, Family, build, forward, generate, shared
from method_matrix import REDUCING, Case, matrix
from reference_forward import family_of
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

import duet_vlm
from duet_vlm.models.lookup import adapter_for
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.runtime import compat
from duet_vlm.runtime.encode import attention_intercept

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


class Pristine(NamedTuple):
    """A model, its state before anybody was ever attached to it, and what it says to ``MIXED``."""

    model: nn.Module
    before: dict[str, Any]
    plain: torch.Tensor


PRISTINE: dict[tuple[str, str], Pristine] = {}


def pristine(family: str, attention: str = "sdpa") -> Pristine:
    """Made anew where a test has left something behind, which that test is told and not the next; else the one that
    others gave back."""
    key = family, attention
    if key not in PRISTINE or snapshot(PRISTINE[key].model) != PRISTINE[key].before:
        model = warm(family, attention)
        PRISTINE[key] = Pristine(model, snapshot(model), forward(model, FAMILIES[family].inputs(MIXED)).logits)
    return PRISTINE[key]


def test_there_are_hooks_to_compare() -> None:
    assert {
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
    } <= set(HOOKS)


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


@matrix(parts=1)
def test_detach_leaves_no_trace(case: Case) -> None:
    inputs, (model, before, plain) = FAMILIES[case.family].inputs(MIXED), pristine(case.family, case.attention)
    handle = case.attach(model)
    assert snapshot(model) != before
    generate(model, inputs, 3)
    handle.detach()
    assert snapshot(model) == before
    assert torch.equal(forward(model, inputs).logits, plain)
    handle.detach()  # harmless
    assert snapshot(model) == before


@matrix("duet", "fastv", attention=("sdpa",), place=tuple(PLACES))
def test_an_exception_inside_forward_leaves_no_trace(case: Case, place: str) -> None:
    """The next call of the still attached model is right too: no half-finished call is left behind."""
    inputs, (model, before, plain) = FAMILIES[case.family].inputs(MIXED), pristine(case.family, case.attention)
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
        stacks = handle._model_hooks.state
        assert not stacks.forward_contexts and not stacks.encode_contexts and not stacks.active_configs
    assert snapshot(model) == before


class Stop(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise Boom


@matrix("duet", "fastv", attention=("sdpa",))
def test_an_exception_between_decode_steps_leaves_no_trace(case: Case) -> None:
    inputs, (model, before, plain) = FAMILIES[case.family].inputs(MIXED), pristine(case.family, case.attention)
    with pytest.raises(Boom), case.attach(model):
        generate(model, inputs, logits_processor=LogitsProcessorList([Stop()]))
    assert snapshot(model) == before
    assert torch.equal(forward(model, inputs).logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_in_the_loss_leaves_no_trace(family: str) -> None:
    inputs, (model, before, plain) = FAMILIES[family].inputs(MIXED), pristine(family)
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
    # a hook set before ours sees every row, one set after sees the survivors
    assert len(rows) == 2 and rows[1] < rows[0]
    assert seen[2:] == [inputs["input_ids"].shape[1]] * 2
    early.remove()
    late.remove()
    assert not layer._forward_pre_hooks


# ---- what others put on the model


def standing(model: nn.Module) -> dict[tuple[nn.Module, str], Any]:
    """Every instance attribute of every module that can be called."""
    return {(m, key): value for m in model.modules() for key, value in vars(m).items() if callable(value)}


def around(plain: Callable[..., Any], calls: list[str], name: str) -> Callable[..., Any]:
    """Somebody else's wrapper, which counts."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return plain(*args, **kwargs)

    counted.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    return counted


def wrap_all(
    model: nn.Module, before: dict[tuple[nn.Module, str], Any], calls: list[str]
) -> dict[tuple[nn.Module, str], Any]:
    """Put a wrapper of somebody else on everything that attach put in front of a method; what it stands on."""
    ours = {place: value for place, value in standing(model).items() if before.get(place) is not value}
    for (module, name), value in ours.items():
        vars(module)[name] = around(value, calls, name)
    return ours


@matrix("duet", "fastv", attention=("sdpa",))
def test_others_wrappers_stay_and_pass_straight_through_ours(case: Case) -> None:
    model, inputs = warm(case.family), FAMILIES[case.family].inputs(MIXED)
    before, found, plain = snapshot(model), standing(model), generate(model, inputs, 3)
    calls: list[str] = []
    handle = case.attach(model)
    reduced = generate(model, inputs, 3)
    ours = wrap_all(model, found, calls)
    assert {"forward", "generate", "_loss_function", adapter_for(model).modalities[0].encode} <= {
        name for _, name in ours
    }
    assert all(torch.equal(a, b) for a, b in zip(generate(model, inputs, 3).logits, reduced.logits, strict=True))
    theirs = {place: vars(place[0])[place[1]] for place in ours}
    with pytest.warns(UserWarning, match=r"left there: .*\(counted of test_detach\.py\)") as caught:
        handle.detach()
    assert len(caught) == 1 and all(
        f"{type(module).__name__}.{name} (" in str(caught[0].message) for module, name in ours
    )
    assert {place: vars(place[0])[place[1]] for place in ours} == theirs
    calls.clear()
    after = generate(model, inputs, 3)
    assert all(torch.equal(a, b) for a, b in zip(after.logits, plain.logits, strict=True)) and {
        "forward",
        "generate",
    } <= set(calls)
    twin = copy.deepcopy(model)
    for (module, name), value in ours.items():  # they put back what they found: ours, which is inert
        vars(module)[name] = value
    assert all(torch.equal(a, b) for a, b in zip(generate(model, inputs, 3).logits, plain.logits, strict=True))
    with case.attach(model):
        generate(model, inputs, 3)
    assert snapshot(model) == before  # the next handle takes them along
    assert torch.equal(forward(twin, inputs).logits, forward(model, inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_others_wrappers_that_come_and_go_while_attached(family: str, recwarn: pytest.WarningsRecorder) -> None:
    model, inputs = warm(family), FAMILIES[family].inputs(MIXED)
    before, found = snapshot(model), standing(model)
    with duet_vlm.attach(model, "duet", **REDUCING["duet"]):
        for (module, name), value in wrap_all(model, found, []).items():
            forward(model, inputs)
            vars(module)[name] = value
    assert snapshot(model) == before and not [w for w in recwarn if "left there" in str(w.message)]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", FAMILIES)
def test_others_wrappers_from_before_taken_off(family: str, when: str, recwarn: pytest.WarningsRecorder) -> None:
    """Before detach that takes ours off as well, and detach does not bring theirs back; after detach they are as they
    were."""
    model, inputs, calls = warm(family), FAMILIES[family].inputs(MIXED), []
    before, plain = snapshot(model), forward(model, inputs).logits
    places = [
        (model, "forward"),
        (model, "generate"),
        (model.model, adapter_for(model).modalities[0].encode),
        (model.model, "forward"),
    ]
    for module, name in places:
        vars(module)[name] = around(getattr(module, name), calls, name)
    wrapped = snapshot(model)
    handle = duet_vlm.attach(model, "duet", **REDUCING["duet"])
    forward(model, inputs)
    if when == "after":
        handle.detach()
        assert snapshot(model) == wrapped and calls
    for module, name in reversed(places):
        del vars(module)[name]
    handle.detach()
    assert snapshot(model) == before and not [w for w in recwarn if "left there" in str(w.message)]
    assert torch.equal(forward(model, inputs).logits, plain)


def test_a_loss_and_a_config_that_others_set_while_attached_stay() -> None:
    model, inputs = warm("llava"), FAMILIES["llava"].inputs(MIXED)
    plain = forward(model, inputs).logits
    (attention,) = adapter_for(model).vision_attentions(None)
    config = copy.copy(attention.config)

    def loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(7.0)

    handle = duet_vlm.attach(model, "duet", **REDUCING["duet"])
    model.loss_function, attention.config = loss, config
    with pytest.warns(
        UserWarning,
        match=r"LlavaForConditionalGeneration\._loss_function \(loss of test_detach\.py\).*config \(CLIPVisionConfig\)",
    ):
        handle.detach()
    assert model.loss_function is loss and attention.config is config
    out = forward(model, inputs, labels=inputs["input_ids"])
    assert out.loss == 7 and torch.equal(out.logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_that_somebody_still_holds_are_inert(family: str) -> None:
    model, inputs = warm(family), FAMILIES[family].inputs(MIXED)
    found, plain = standing(model), generate(model, inputs, 3)
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    known = {id(hook) for module in model.modules() for kind in kinds for hook in getattr(module, kind).values()}
    handle = duet_vlm.attach(model, "duet", **REDUCING["duet"])
    generate(model, inputs, 3)
    ours = {place: value for place, value in standing(model).items() if found.get(place) is not value}
    held = [
        hook
        for module in model.modules()
        for kind in kinds
        for hook in getattr(module, kind).values()
        if id(hook) not in known
    ]
    handle.detach()
    assert held and all(hook(model, (), {}, None) is None for hook in held)
    vars(model)["generate"], vars(model)["forward"] = ours[model, "generate"], ours[model, "forward"]
    again = generate(model, inputs, 3)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, plain.logits, strict=True))
    with pytest.raises(RuntimeError, match="nothing to report yet|detached"):
        duet_vlm.attach(model, "duet", **REDUCING["duet"]).report()


def test_an_attention_that_was_called_before_its_recorder_went() -> None:
    """The name of the attention function is read first and the recorder second; another thread may detach in between."""
    model, inputs = warm("llava"), FAMILIES["llava"].inputs(MIXED)
    (attention,) = adapter_for(model).vision_attentions(None)
    query = torch.randn(1, 2, 5, 4)
    with duet_vlm.attach(model, "duet", **REDUCING["duet"]):
        forward(model, inputs)
    arguments = {"scaling": 0.5, "dropout": 0.0}
    expected, _ = compat.attention_function(attention, "sdpa")(attention, query, query, query, None, **arguments)
    assert torch.equal(
        compat.attention_function(attention, attention_intercept.QKRecorder.name)(
            attention, query, query, query, None, **arguments
        )[0],
        expected,
    )


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


def test_a_handle_says_model_method_and_budget() -> None:
    model = shared("llava")
    name = type(model).__name__
    with duet_vlm.attach(model, "duet", budget=5) as handle:
        budget = "budget 5 visual tokens per layer and image"
        assert repr(handle) == f"<duet_vlm.Handle: duet on {name} (llava), {budget}; attached>"
        handle.set(budget=0.225, options=TokenOptions(text_query="last"))
        assert "budget 22.5 % of the visual tokens, options.text_query='last'; attached>" in str(handle)
    assert repr(handle).endswith("; detached>")
    with duet_vlm.attach(model, "scope", keep=3) as handle:
        assert f"scope on {name} (llava), own settings, keep=3;" in repr(handle)
    with duet_vlm.attach(model, "divprune+duet", budget=0.5) as handle:
        assert "divprune+duet on " in repr(handle)
