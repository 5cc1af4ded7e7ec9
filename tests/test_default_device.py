"""``torch.set_default_device``: nothing that the library makes may land there; its tensors go where the model's are, or
on the host."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXED, clips_for, forward, generate, shared
from method_matrix import REDUCING, Case, matrix
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import duet_vlm
from duet_vlm.evaluation.speed.prompts import prompt_for
from duet_vlm.models.lookup import adapter_for

ROOT = Path(duet_vlm.__file__).parent
MAKERS = _device_constructors()


class Named(TorchFunctionMode):
    """Refuses tensors that the library, or a plain function of transformers that it calls, makes without naming a
    device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MAKERS and kwargs.get("device") is None:
            place = self.ours()
            assert place is None, f"torch.{func.__name__} without a device at {place}"
        return func(*args, **kwargs)

    @staticmethod
    def ours() -> str | None:
        frame = sys._getframe(2)
        while frame is not None:
            module = frame.f_globals.get("__name__", "").split(".")[0]
            if module == "duet_vlm":
                return f"{frame.f_code.co_filename}:{frame.f_lineno}"
            if module not in ("torch", "transformers") or (module == "transformers" and "self" in frame.f_locals):
                return None
            frame = frame.f_back
        return None


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


def test_a_tensor_without_a_device_is_found() -> None:
    with Named(), pytest.raises(AssertionError, match=r"torch\.arange without a device at .*ragged\.py"):
        exec(
            compile("import torch; torch.arange(3)", duet_vlm.ops.ragged.__file__, "exec"),
            {"__name__": "duet_vlm.ops.ragged"},
        )


def batches(family: str) -> list[dict[str, torch.Tensor]]:
    """Images, and clips where the family takes them."""
    clips = "video" in {stream.name for stream in adapter_for(shared(family)).modalities}
    return [FAMILIES[family].inputs(rows) for rows in (MIXED, *([clips_for(family)] if clips else []))]


@matrix(attention=("sdpa",), parts=1)
def test_every_tensor_names_its_device(case: Case) -> None:
    model = case.model()
    with Named(), case.attach() as handle:
        for inputs in batches(case.family):
            generate(model, inputs, 3)
            forward(model, inputs, labels=inputs["input_ids"])
            handle.report()
            assert handle.trace


# they make tensors without a device themselves, and read them
STOCK_CANNOT = ("gemma3", "mistral3_windows", "qwen2_5_vl")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_default_device_changes_nothing(family: str) -> None:
    """On the meta device there are no numbers: whatever lands there cannot be read back."""
    model = shared(family)
    for inputs in batches(family):
        with duet_vlm.attach(model, "duet", **REDUCING["duet"]) as handle:
            plain, trace, report = generate(model, inputs, 3), handle.trace, str(handle.report())
        with default_device("meta"):
            if family in STOCK_CANNOT:
                with pytest.raises(NotImplementedError):
                    generate(model, inputs, 3)
                continue
            with duet_vlm.attach(model, "duet", **REDUCING["duet"]) as handle:
                other = generate(model, inputs, 3)
                assert (handle.trace, str(handle.report())) == (trace, report)
        assert all(torch.equal(a, b) for a, b in zip(plain.logits, other.logits, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_noise_and_places_in_the_tower_are_made_on_the_host(family: str) -> None:
    adapter = adapter_for(shared(family))
    with Named():
        prompt_for(adapter, 2, 5)
    if hasattr(adapter, "raster"):
        sizes = [[1, 8, 8], [1, 4, 12]]
        with default_device("meta"):
            order = adapter.raster(sizes)
        assert order.device.type == "cpu" and torch.equal(order, adapter.raster(sizes))


def test_salient_words_do_not_depend_on_it() -> None:
    from duet_vlm.evaluation import tiny
    from duet_vlm.inputs.text_queries import salient_words

    _, processor = tiny.load()
    text = ["what color is the red star ?", "how many ?"]
    ids = processor.tokenizer(text, padding=True, return_tensors="pt")["input_ids"]
    plain = salient_words(processor.tokenizer, ids, ids != processor.tokenizer.pad_token_id)
    with default_device("meta"):
        mask = salient_words(processor.tokenizer, ids, ids != processor.tokenizer.pad_token_id)
    assert mask.device.type == "cpu" and torch.equal(mask, plain)


# the embedded model's own training runs on the CPU
FILES = [path for path in sorted(ROOT.rglob("*.py")) if "recipe" not in path.parts]
FACTORIES = {function.__name__ for function in _device_constructors()}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_factory_in_the_source_names_a_device(path: Path) -> None:
    calls = [
        n
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
    ]
    made = [
        n
        for n in calls
        if isinstance(n.func.value, ast.Name) and n.func.value.id == "torch" and n.func.attr in FACTORIES
    ]
    assert not [f"{path}:{n.lineno}" for n in made if not any(word.arg == "device" for word in n.keywords)]
