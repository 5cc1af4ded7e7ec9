"""Ranking in half precision does not depend on where a prompt begins."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from families import FAMILIES, ONE, Inputs, Picture, build
from method_views import seen_by
from torch import Tensor, nn

import duet_vlm

# lengths 1 and 2, so that every cosine is a multiple of 1/2 and exact


def held_by_layers(
    model: nn.Module, family: str, inputs: Inputs, kept: list[Tensor], replace_up_to: int = -1
) -> list[Any]:
    """Hooks that note what each decoder layer reads, or hand the first ones what was noted."""

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any], layer: int) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer > replace_up_to:
            kept.append(hidden.clone()) if replace_up_to < 0 else None
            return None
        return ((kept[layer], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": kept[layer]})

    layers = FAMILIES[family].text(model).layers
    return [
        layer.register_forward_pre_hook(partial(note, layer=i), with_kwargs=True, prepend=True)
        for i, layer in enumerate(layers)
    ]


@pytest.mark.parametrize("method", ["tokencarve", "dart", "sparsevlm", "sieve", "fastv"])
@pytest.mark.parametrize("name", ["llava", "llava_gqa"])
def test_equal_rows_in_half_precision_are_ranked_alike_wherever_a_prompt_begins(name: str, method: str) -> None:
    """Rounded rotary tables made attention and the length of keys depend on the padding in front of a prompt."""
    model, made = build(name, dtype=torch.bfloat16), FAMILIES[name]
    settings: dict[str, Any] = {"schedule": ((2, 0.5),)} if method != "fastv" else {"layers": 2, "keep": 0.5}
    for seed in range(6):
        row, longer = (1, 5, Picture(100 + seed, 4, 5), *range(7, 13)), (1, Picture(200 + seed, 4, 5), *range(20, 57))
        both, alone = (in_half(made.inputs(rows)) for rows in ([longer, row], [row]))
        real = both["attention_mask"][1].bool()
        with torch.no_grad(), duet_vlm.attach(model, method, **settings) as handle:
            kept: list[Tensor] = []
            hooks = held_by_layers(model, name, both, kept)
            model(**both)
            together = handle.trace[1][0].stages
            for hook in hooks:
                hook.remove()
            kept = [hidden[1:][:, real] for hidden in kept[:3] if hidden.shape[1] == len(real)]
            hooks = held_by_layers(model, name, alone, kept, len(kept) - 1)
            model(**alone)
            for hook in hooks:
                hook.remove()
            assert [stage.kept for stage in handle.trace[0][0].stages] == [stage.kept for stage in together]


def in_half(inputs: Inputs) -> Inputs:
    return {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}


def test_the_gradient_in_half_precision_is_that_of_a_prompt_that_begins_at_the_first_place() -> None:
    """The same numbers, to the last bit, for prompts of one length at other positions."""
    model, made = build("llava", dtype=torch.bfloat16), FAMILIES["llava"]
    inputs = in_half(made.inputs([ONE]))
    places = torch.arange(inputs["input_ids"].shape[1])[None]
    views = []
    rows: list[Tensor] = []
    for begin in (0, 37):
        hooks = held_by_layers(model, "llava", inputs, rows, -1 if begin == 0 else 2)
        views += seen_by(model, inputs | {"position_ids": places + begin})
        for hook in hooks:
            hook.remove()
    assert torch.equal(views[0].gradient, views[1].gradient)
