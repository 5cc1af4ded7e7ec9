"""Methods that choose by coverage and diversity, on models: counts, costs, what they refuse, and training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import FAMILIES, FIRST, MIXED, ONE, Picture, any_res_crops, forward, pictures_of, shared
from method_views import CONSTANT, GREEDY, PICTURES, chosen_tokens
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import duet_vlm


@pytest.mark.parametrize("method", GREEDY)
@pytest.mark.parametrize("family", FIRST)
def test_flops_count_the_rows_that_are_projected(family: str, method: str) -> None:
    """The projector's first matrix tells how many rows it really ran on: those that enter where V2V can run before it,
    else all of them.

    LLaVA-NeXT packs behind the projector, so every patch of every crop goes through it.
    """
    made, model, seen = FAMILIES[family], shared(family), []
    projector = getattr(model.model, "multi_modal_projector", None) or model.model.visual.merger

    def note(matrix: Any, args: Any) -> None:
        seen.append((args[0].numel() // matrix.in_features, matrix.in_features, matrix.out_features))

    hooks = [m.register_forward_pre_hook(note) for m in projector.modules() if isinstance(m, nn.Linear)]
    with duet_vlm.attach(model, method, keep=5, **GREEDY[method]) as handle:
        model(**made.inputs([ONE]))  # with gradients, so that the whole tower runs
        report = handle.report()
    for hook in hooks:
        hook.remove()
    saved = report.full.vision_flops - report.observed.vision_flops
    picture: Any = ONE[2]
    behind = made.mrope or family == "llava_next"
    tokens = 16 * (1 + math.prod(any_res_crops(picture))) if family == "llava_next" else made.tokens(picture)
    assert [rows for rows, _, _ in seen] == [tokens if method == "divprune" or behind else 5] * 2
    assert saved == sum(2 * (tokens - rows) * a * b for rows, a, b in seen)
    assert report.predicted.vision_flops == report.observed.vision_flops


@pytest.mark.parametrize("family", FIRST)
def test_flops_of_the_vision_side_are_those_that_torch_counts(family: str) -> None:
    """Crops, frames, windows and what packing cuts off included; pictures whose sides are whole windows."""
    rows = [(1, Picture(1, 4, 6), 5, Picture(2, 2, 4), 6, 7), (1, 5, Picture(3, 6, 2), 8)]
    if family.startswith("qwen"):
        rows.append((1, Picture(4, 2, 4, frames=3), 9))
    model, inputs = shared(family, "eager"), FAMILIES[family].inputs(rows)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for stream, names in (
            ("image", ("pixel_values", "image_grid_thw", "image_sizes")),
            ("video", ("pixel_values_videos", "video_grid_thw")),
        ):
            if names[0] in inputs:
                getattr(model.model, f"get_{stream}_features")(
                    **{name: inputs[name] for name in names if name in inputs}
                )
    with duet_vlm.attach(model, "none") as handle:
        forward(model, inputs)
        assert handle.report().full.vision_flops == counter.get_total_flops()


@pytest.mark.parametrize("method", CONSTANT)
def test_counts(method: str) -> None:
    reducer = duet_vlm.get_method(method)
    assert reducer().plan(576, 32, 64).counts == (64,) * 32
    assert reducer().plan(576, 32, 0.11).counts == (63,) * 32  # 63.36
    assert reducer(keep=0.5).plan(9, 4, None).counts == (4,) * 4
    assert reducer().plan(50, 32, 64) == duet_vlm.SpanPlan(50, 50, 0, (50,) * 32)  # no larger than the budget: whole
    assert reducer(keep=64).plan(50, 32, None).counts == (50,) * 32
    with pytest.raises(duet_vlm.BudgetError, match="at least one token enters") as caught:
        reducer().plan(5, 8, 0.1)
    assert caught.value.floor == 1
    with pytest.raises(duet_vlm.BudgetError, match="needs a budget"):
        reducer().plan(5, 8, None)
    with pytest.raises(ValueError, match="not both"):
        reducer(keep=4).plan(5, 8, 0.5)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("divprune", {"options": {"cls_token": True, "positions": "compact"}}, "the CLS row is not projected"),
        ("divprune", {"keep": -1}, "keep=-1"),
        ("scope", {"keep": 1.5}, r"keep=1.5: a float is a fraction"),
        ("scope", {"alpha": -0.5}, "alpha=-0.5: must be a number of at least 0"),
        ("scope", {"alpha": float("nan")}, "alpha=nan"),
        ("scope", {"picks": 0}, "picks=0: how many tokens a greedy step chooses"),
        ("duet_plus", {"alpha": -1}, "alpha=-1: must be a number of at least 0"),
        ("duet_plus", {"pool": float("inf")}, "pool=inf: must be"),
        ("duet_plus", {"tau": 2}, "tau=2: a cosine"),
        ("duet_plus", {"keep": 2.0}, "keep=2.0"),
        ("duet_plus", {"schedule": ((4, 0.5), (3, 0.2))}, "strictly increasing"),
    ],
)
def test_bad_settings(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        duet_vlm.make_method(method, **settings)


@pytest.mark.parametrize("method", GREEDY)
@pytest.mark.parametrize("family", FIRST)
def test_keeping_none_and_one(family: str, method: str) -> None:
    made, model = FAMILIES[family], shared(family)
    for keep in (0, 1):
        with duet_vlm.attach(model, method, keep=keep, **GREEDY[method]) as handle:
            assert forward(model, made.inputs(MIXED)).logits.isfinite().all()
            assert [len(tokens) for tokens in chosen_tokens(handle)] == [keep] * len(PICTURES)


@pytest.mark.parametrize("family", FIRST)
def test_spans_of_one_batch_may_be_whole_or_cut(family: str) -> None:
    """A budget between the sizes of two pictures: the small one stays whole, the large one is cut."""
    made, model = FAMILIES[family], shared(family)
    row = (1, Picture(1, 2, 3), 5, Picture(2, 4, 5), 7, 8)
    sizes = [made.tokens(picture) for picture in pictures_of([row])]
    for method in CONSTANT:
        with duet_vlm.attach(model, method, budget=8) as handle:
            forward(model, made.inputs([row]))
            assert [len(tokens) for tokens in chosen_tokens(handle)] == [min(8, size) for size in sizes]


@pytest.mark.parametrize("method", GREEDY)
@pytest.mark.parametrize("family", FIRST)
def test_gradient_reaches_the_tower_through_chosen_rows(family: str, method: str) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs([ONE])
    tower = getattr(model.model, "visual", None) or model.model.vision_tower
    first = next(p for name, p in tower.named_parameters() if "patch" in name and p.requires_grad)
    with duet_vlm.attach(model, method, keep=5, **GREEDY[method]):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        (gradient,) = torch.autograd.grad(loss, [first])
    assert gradient.isfinite().all() and bool(gradient.any())
