"""What others do to models: half precision, saving, offloading, quantised layers, PEFT."""

from __future__ import annotations

import copy
import functools
import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from families import FAMILIES, FIRST, MIXED, build, forward, generate, shared
from method_matrix import OFFICIAL, REDUCING, Case, matrix
from torch import Tensor, nn

import duet_vlm
from duet_vlm.models.adapter import LINEAR
from duet_vlm.models.lookup import adapter_for

CLOSE = {"rtol": 1e-3, "atol": 2e-4}


@matrix("duet", "visionzip", "pyramiddrop", dtype=(torch.bfloat16, torch.float16))
def test_half_precision_runs_finite(case: Case, dtype: torch.dtype) -> None:
    model = build(case.family, case.attention, dtype)
    inputs = FAMILIES[case.family].inputs(MIXED)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with case.attach(model) as handle:
        written = generate(model, inputs, 4)
        report = handle.report()
        forward_logits = forward(model, inputs).logits
        real = handle.slots >= 0
    assert all(torch.isfinite(step).all() for step in written.logits)
    assert torch.isfinite(forward_logits[real]).all() and forward_logits.dtype == dtype
    assert report.observed.kv_bytes == report.predicted.kv_bytes
    assert report.nominal == report.measured


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@matrix("duet", "fastv", attention=("sdpa",))
def test_an_attached_model_saves_the_same_bytes(case: Case, tmp_path: Path) -> None:
    model = case.fresh()
    model.save_pretrained(tmp_path / "plain")
    with case.attach(model):
        forward(model, FAMILIES[case.family].inputs(MIXED))
        model.save_pretrained(tmp_path / "attached")
        state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = digest(tmp_path / "plain")
    assert {"config.json", "model.safetensors"} <= set(plain)
    assert digest(tmp_path / "attached") == plain
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()) and len(state) == len(
        model.state_dict()
    )


def test_official_presets_save_the_same_bytes(tmp_path: Path) -> None:
    model = build("llava")
    model.save_pretrained(tmp_path / "plain")
    with duet_vlm.attach(model, OFFICIAL["duet"]):
        model.save_pretrained(tmp_path / "attached")
    assert digest(tmp_path / "attached") == digest(tmp_path / "plain")


def test_state_dicts_can_be_pickled_while_attached() -> None:
    model = build("llava")
    with duet_vlm.attach(model, "duet", budget=12):
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True).keys() == model.state_dict().keys()


@matrix("duet", "fastv", attention=("sdpa",), when=("before", "after"), how=("offload", "dispatch"))
def test_offloaded_and_dispatched_models(case: Case, how: str, when: str) -> None:
    """accelerate's hooks move weights in and out around every module; ours run beside them, whichever came first.

    Where offloading takes away weights that the stock model reads outside of the module that owns them, it fails
    without us, too: what is left to try is the family's word.
    """
    inputs = FAMILIES[case.family].inputs(MIXED)
    runs: dict[str, Any] = {"generate": functools.partial(generate, new=3), "call": forward}
    able = FAMILIES[case.family].offloaded if how == "offload" else "generate"
    model = case.fresh()

    def spread() -> None:
        if how == "offload":
            cpu_offload(model, torch.device("cpu"), state_dict={k: v.clone() for k, v in model.state_dict().items()})
        else:
            dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)

    if able not in runs:
        spread()
        with pytest.raises(RuntimeError, match="meta"):
            forward(model, inputs)
        return
    run = runs[able]
    with case.attach() as handle:
        expected, trace = run(case.model(), inputs), handle.trace
    if when == "before":
        spread()
    with case.attach(model) as handle:
        if when == "after":
            spread()
        found = run(model, inputs)
        assert handle.trace == trace
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_map_made_while_attached_outlives_the_handle(family: str) -> None:
    """accelerate's forwards stand on ours and keep calling them; they may go at any time after."""
    model, inputs = build(family), FAMILIES[family].inputs(MIXED)
    plain = forward(model, inputs).logits
    handle = duet_vlm.attach(model, "duet", **REDUCING["duet"])
    dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    with pytest.warns(UserWarning, match=r"left there: .*\.forward \(new_forward of hooks\.py\)"):
        handle.detach()
    assert torch.equal(forward(model, inputs).logits, plain)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(forward(model, inputs).logits, plain)
    assert torch.equal(forward(copy.deepcopy(model), inputs).logits, plain)


class Packed(nn.Module):
    """A linear layer without ``weight``, as quantised layers have it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.low = nn.Buffer(linear.weight.detach().clone())
        self.shift = None if linear.bias is None else nn.Buffer(linear.bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        raise AttributeError("packed layers have no weight")

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.low, self.shift)


def pack(model: nn.Module) -> int:
    linears = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    for parent, name, child in linears:
        setattr(parent, name, Packed(child))
    return len(linears)


@matrix("duet", "fastv", "visionzip", attention=("sdpa",))
def test_layers_without_weights(case: Case) -> None:
    inputs = FAMILIES[case.family].inputs(MIXED)
    with case.attach() as handle:
        expected, trace = generate(case.model(), inputs, 3), handle.trace
    model = case.fresh()
    assert pack(model) > 50
    with case.attach(model) as handle:
        found = generate(model, inputs, 3)
        assert handle.trace == trace
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


class Low(nn.Module):
    """A low-rank adapter around a linear layer, as PEFT puts it in."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        draw = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(torch.randn(2, base.in_features, generator=draw) * 0.3)
        self.b = nn.Parameter(torch.randn(base.out_features, 2, generator=draw) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.a.T @ self.b.T


class Adapted(nn.Module):
    """Like a PeftModel: holds the model, forwards to it, and gives it out by ``get_base_model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model
        decoder = adapter_for(model).text_model
        names = [name for name, _ in decoder.named_modules() if name.endswith((".q_proj", ".k_proj", ".v_proj"))]
        for parent, name in (name.rsplit(".", 1) for name in names):
            module = decoder.get_submodule(parent)
            setattr(module, name, Low(getattr(module, name)))

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)


@matrix("duet", "fastv", attention=("sdpa",))
def test_peft_like_wrappers(case: Case) -> None:
    """Attaching to the wrapper is attaching to the model in it; ranking uses the adapted projections."""
    inputs = FAMILIES[case.family].inputs(MIXED)
    wrapper = Adapted(case.fresh())
    with case.attach(wrapper.base_model) as handle:
        expected, trace = generate(wrapper.base_model, inputs, 3), handle.trace
    with case.attach(wrapper) as handle:
        found = generate(wrapper, inputs, 3)
        assert handle.trace == trace
        with pytest.raises(ValueError, match="attached to this model already"):
            duet_vlm.attach(wrapper.base_model, "fastv")
        loss = wrapper(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))
    with case.attach() as handle:
        forward(case.model(), inputs)
        assert handle.trace != trace  # the adapters changed who survives
    adapters = [p for name, p in wrapper.named_parameters() if name.endswith((".a", ".b"))]
    attending = sum(kind != LINEAR for kind in adapter_for(wrapper).layer_types)
    assert len(adapters) == 6 * attending and all(p.grad is not None and torch.isfinite(p.grad).all() for p in adapters)


@pytest.mark.parametrize("family", FIRST)
def test_hidden_states_follow_the_schedule(family: str) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs(MIXED)
    with duet_vlm.attach(model, "duet", **REDUCING["duet"]):
        output = forward(model, inputs, output_hidden_states=True)
    widths = [state.shape[1] for state in output.hidden_states]
    assert len(widths) == 9 and widths[-1] == output.logits.shape[1]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 4


def test_functools_partial_models_are_no_models() -> None:
    with pytest.raises(TypeError, match=r"partial \(model_type=None\) is not supported"):
        duet_vlm.attach(functools.partial(shared("llava")), "duet", budget=12)  # type: ignore[arg-type]
