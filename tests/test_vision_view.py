"""What a method before the decoder may ask for, on every family: several layers, heads, queries, the grid, the
question, the projector."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from families import (
    FAMILIES,
    MIXED,
    ONE,
    TEXT,
    THREE,
    TWO,
    any_res_layout,
    build,
    clips_for,
    forward,
    generate,
    pictures_of,
    shared,
)
from torch import Tensor

import duet_vlm
from duet_vlm import EncoderReducer, Selection, SpanPlan
from duet_vlm.evaluation.speed.prompts import encode
from duet_vlm.models.lookup import adapter_for
from duet_vlm.ops.ragged import pack_right
from duet_vlm.ops.select import top
from duet_vlm.planning.solve import plan_fixed_count
from duet_vlm.reducers import registry
from duet_vlm.reducers.encoder_view import EncoderView
from duet_vlm.reducers.inputs import VISION_LAYER_INPUTS, Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.runtime.encode.build_view import in_float32

seen: list[EncoderView] = []


@dataclass(frozen=True)
class Probe(EncoderReducer):
    """Asks for everything and keeps the first rows."""

    name = "probe"
    requires = VISION_LAYER_INPUTS | {Input.GRID, Input.QUESTION, Input.PROJECTOR, Input.PROJECTED_FEATURES}

    keep: float = 0.5
    second: Any = 0

    @property
    def signal_layers(self) -> tuple[Any, ...]:
        return (self.options.signal_layer, self.second)

    def plan(self, tokens: int, depth: int, budget: Any) -> SpanPlan:
        return plan_fixed_count(self, self.keep, tokens, depth, budget)

    def select_tokens(self, view: EncoderView) -> Selection:
        seen.append(view)
        first = -torch.arange(view.valid.shape[1], device=view.valid.device).expand(view.valid.shape).float()
        return Selection.keep_only(
            *pack_right(top(first, view.valid, view.dominant), max(plan.dominant for plan in view.plans))
        )


@dataclass(frozen=True)
class Raw(Probe):
    """The same, in front of the projector where there is a point-wise one."""

    name = "raw"
    requires: ClassVar[frozenset[Input]] = VISION_LAYER_INPUTS | {
        Input.GRID,
        Input.QUESTION,
        Input.PROJECTOR,
        Input.FEATURES,
    }


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    seen.clear()
    yield
    seen.clear()


def rows_of(family: str) -> list[Any]:
    return [MIXED, clips_for(family)] if FAMILIES[family].video else [MIXED]


def views(family: str, method: Probe, rows: Any = MIXED, model: Any = None) -> list[EncoderView]:
    seen.clear()
    model = shared(family) if model is None else model
    with duet_vlm.attach(model, method):
        forward(model, FAMILIES[family].inputs(rows))
    return list(seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_layers_are_those_that_single_ones_give(family: str) -> None:
    for rows in rows_of(family):
        both = views(family, Probe(options=TokenOptions(crops="joint")), rows)
        alone = [
            views(family, Probe(options=TokenOptions(signal_layer=layer, crops="joint"), second=layer), rows)
            for layer in (None, 0)
        ]
        for number, view in enumerate(both):
            for layer, one in zip(view.layers, (alone[0][number].layers[0], alone[1][number].layers[0]), strict=True):
                assert (
                    all(torch.equal(a, b) for a, b in zip(layer.tensors(), one.tensors(), strict=True))
                    and len(layer.tensors()) == 5
                )
            assert view.importance is view.layers[0].importance and view.keys is view.layers[0].keys
            assert not torch.equal(view.layers[0].keys, view.layers[1].keys)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_add_up_to_the_importance(family: str) -> None:
    for rows in rows_of(family):
        for view in views(family, Probe(options=TokenOptions(crops="joint")), rows):
            for layer in view.layers:
                content = view.valid & (view.coords >= 0).all(-1)
                mean, total = (reduced(layer.heads, -1)[content] for reduced in (torch.mean, torch.sum))
                found = layer.importance[content]
                assert torch.allclose(mean, found, rtol=1e-4, atol=1e-6) or torch.allclose(
                    total, found, rtol=1e-4, atol=1e-6
                )


def with_queries_as_keys(family: str) -> Any:
    """A model whose vision queries are its keys."""
    model = build(family)
    with torch.no_grad():
        for tower in [
            module for name, module in model.model.named_modules() if name.endswith(("tower", "visual", "vision_model"))
        ]:
            weights = dict(tower.named_parameters())
            for name, weight in weights.items():
                if "k_proj" in name or "k_norm" in name:
                    weights[name.replace("k_proj", "q_proj").replace("k_norm", "q_norm")].copy_(weight)
                if ".qkv." in name:
                    query, key, _ = weight.chunk(3)
                    query.copy_(key)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_take_the_way_of_the_keys(family: str) -> None:
    """Where both are the same numbers in the tower they are so behind it: crops packed, cells averaged, windows put
    back in order."""
    model = with_queries_as_keys(family)
    for rows in rows_of(family):
        for view in views(family, Probe(options=TokenOptions(crops="joint")), rows, model):
            content = view.valid & (view.coords >= 0).all(-1)
            for layer in view.layers:
                torch.testing.assert_close(layer.queries[content], layer.keys[content])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_projector_asked_again_gives_its_rows(family: str) -> None:
    for rows in rows_of(family):
        for view in views(family, Probe(options=TokenOptions(crops="joint")), rows):
            again = view.project(lambda x: x)
            content = view.valid & (view.coords >= 0).all(-1)
            torch.testing.assert_close(again[content], view.features[content], rtol=1e-4, atol=1e-5)
            moved = view.project(lambda x: x + torch.linspace(-0.5, 0.5, x.shape[-1]))
            assert (moved - again)[content].abs().amax() > 1e-3


@pytest.mark.parametrize("family", ["llava", "llava_gqa", "llava_next", "video_llava"])
def test_states_are_the_rows_that_leave_the_layer(family: str) -> None:
    """Behind a point-wise projector they are the rows that the decoder gets; in front of it the features themselves."""
    model = shared(family)
    for view in views(family, Probe(options=TokenOptions(crops="joint")), rows_of(family)[-1]):
        with torch.no_grad():
            projected = model.model.multi_modal_projector(view.layers[0].states)
        torch.testing.assert_close(projected[view.valid], view.features[view.valid], rtol=1e-4, atol=1e-5)
    if family.startswith("llava") and family != "llava_next":
        (view,) = views(family, Raw())
        assert torch.equal(view.layers[0].states, view.features)


def expected_place(family: str, picture: Any) -> list[tuple[int, int]] | None:
    if family == "llava_next":
        return [(-1, -1) if at is None else (at[1] // 4, at[1] % 4) for at in any_res_layout(picture)]
    if family in ("llava", "llava_gqa", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        tokens = FAMILIES[family].tokens(picture)
        width = picture.width if FAMILIES[family].mrope else int(tokens**0.5)
        return [(i // width, i % width) for i in range(tokens)]
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_grid_says_where_each_token_stands(family: str) -> None:
    for rows in rows_of(family):
        for view in views(family, Probe(options=TokenOptions(crops="joint")), rows):
            shows = (view.coords >= 0).all(-1)
            assert torch.equal(shows, (view.coords >= 0).any(-1)) and not (shows & (view.parts < 0)).any()
            assert (view.coords[shows] < view.grid_size[:, None].expand_as(view.coords)[shows]).all()
            # nobody stands where another does, but in pictures that were resized behind the tower
            for span in range(len(view.valid)):
                where = torch.cat([view.parts[span, :, None], view.coords[span]], 1)[shows[span]]
                assert len(where.unique(dim=0)) == len(where) and len(where) > 1
    pictures = pictures_of(MIXED)
    (view,) = views(family, Probe(options=TokenOptions(crops="joint")))
    for span, picture in enumerate(pictures):
        expected = expected_place(family, picture)
        if expected is not None:
            assert view.coords[span, : len(expected)].tolist() == [list(place) for place in expected]
    if family == "llava_next":
        from families import any_res_crops

        assert view.crop_grid.tolist() == [list(any_res_crops(picture)) for picture in pictures]


# ---- the question


def asked(model: Any, row: list[int], visual: set[int]) -> Tensor:
    """What a prompt asks, by hand: text behind the last placeholder, all text where there is none."""
    last = max((i for i, token in enumerate(row) if token in visual), default=-1)
    text = row[last + 1 :] or [token for token in row if token not in visual]
    return model.get_input_embeddings()(torch.tensor(text)).detach()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_span_gets_the_question_of_its_sample(family: str, side: str) -> None:
    """By forward, by generate(), and from embeddings; several pictures in a prompt, ragged, and a sample without any."""
    made, model = FAMILIES[family], shared(family)
    rows = (ONE, THREE, TEXT, TWO, (1, 5, 6, THREE[1]))
    inputs = made.inputs(rows, side)
    visual = {adapter_for(model).modalities[0].token_id}
    expected = [asked(model, made.expand(row), visual) for row in rows for item in row if not isinstance(item, int)]
    calls = [
        lambda: forward(model, inputs),
        lambda: generate(model, inputs, 2),
        lambda: generate(model, inputs, 2, num_beams=2),
    ]
    for call in calls:
        seen.clear()
        with duet_vlm.attach(model, Probe(options=TokenOptions(protect_predicting_tokens=False))):
            call()
        for view in seen:
            assert len(expected) == len(view.question.embeddings)
            for rows_, valid, wanted in zip(view.question.embeddings, view.question.valid, expected, strict=True):
                assert torch.equal(rows_[valid], wanted)
        assert seen


def test_the_question_of_a_labelled_prompt_ends_where_its_answer_begins() -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs([ONE])
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    with duet_vlm.attach(model, Probe()):
        forward(model, inputs, labels=labels)
    (view,) = seen
    assert torch.equal(
        view.question.embeddings[view.question.valid], model.get_input_embeddings()(torch.tensor(ONE[3:-2]))
    )


def test_a_prompt_of_embeddings_is_a_question_too() -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs([ONE])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with duet_vlm.attach(model, Probe()):
        forward(model, {"inputs_embeds": embeds, "pixel_values": inputs["pixel_values"]})
    (view,) = seen
    assert torch.equal(view.question.embeddings[view.question.valid], embeds[0, -4:])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_that_is_called_by_itself_has_no_question(family: str) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs([ONE])
    brought = {
        name: value
        for name, value in inputs.items()
        if name not in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    }
    with duet_vlm.attach(model, Probe()) as handle:
        with pytest.raises(
            ValueError, match="probe chooses by the question, and an encoder that is called by itself has none"
        ):
            encode(model, brought)
        with handle.paused():
            encode(model, brought)


def test_parts_by_themselves_see_their_own_rows() -> None:
    """Per crop: the grid, states and projected rows of that crop; no mosaic."""
    (joint,) = views("llava_next", Probe(options=TokenOptions(crops="joint")))
    (each,) = views("llava_next", Probe(options=TokenOptions(crops="per_crop")))
    assert not each.crop_grid.any() and joint.crop_grid.any() and len(each.valid) > len(joint.valid)
    crops = len(each.valid) // len(joint.valid)
    for span in range(len(joint.valid)):
        for crop in range(crops):
            rows = (joint.parts[span] == crop) & joint.valid[span]
            part = each.valid[span * crops + crop]
            assert torch.equal(joint.coords[span][rows], each.coords[span * crops + crop][part])
            assert torch.equal(joint.layers[1].states[span][rows], each.layers[1].states[span * crops + crop][part])
            again = each.project(lambda x: x)[span * crops + crop][part]
            torch.testing.assert_close(again, joint.features[span][rows], rtol=1e-4, atol=1e-5)


def test_the_projector_is_asked_in_float32() -> None:
    model = build("llava", dtype=torch.bfloat16)
    inputs = FAMILIES["llava"].inputs([ONE])
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with duet_vlm.attach(model, Probe()):
        forward(model, inputs)
    (view,) = seen
    again = view.project(lambda x: x)
    assert again.dtype == torch.float32
    step = view.project(lambda x: x + 1e-4) - again
    assert 0 < step.abs().amax() < 1e-2


def test_a_quantised_projector_is_asked_as_it_is() -> None:
    class Quantised(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = torch.nn.Parameter(torch.randint(-9, 9, (4, 3), dtype=torch.int8), requires_grad=False)
            self.scale = torch.nn.Parameter(torch.full((3,), 0.5, dtype=torch.bfloat16))

        def forward(self, rows: Tensor) -> Tensor:
            assert rows.dtype == torch.bfloat16
            return rows @ self.packed.bfloat16() * self.scale

    module, rows = Quantised(), torch.randn(2, 4)
    found = in_float32(module)(rows)
    assert found.dtype == torch.float32 and torch.equal(found, module(rows.bfloat16()).float())


# ---- what cannot be


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"second": 9}, "signal_layer=9: this vision tower has no such layer, it has 4; give a number from -4 to 3"),
        ({"second": 1.5}, "signal_layer=1.5"),
    ],
)
def test_layers_that_are_not_there_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        duet_vlm.attach(shared("llava"), replace(Probe(), **settings))


def test_a_share_of_the_depth_is_a_layer_that_sees_whole_pictures() -> None:
    (share,) = views("qwen2_5_vl", Probe(second=0.5))
    full = shared("qwen2_5_vl").model.visual.fullatt_block_indexes
    (number,) = views("qwen2_5_vl", Probe(second=next(layer for layer in full if layer >= 1)))
    assert torch.equal(share.layers[1].importance, number.layers[1].importance)


def test_settings_that_move_the_hooks_are_refused_while_attached() -> None:
    with duet_vlm.attach(shared("llava"), Probe()) as handle:
        with pytest.raises(ValueError, match="signal_layer cannot change while attached"):
            handle.set(second=1)
        handle.set(keep=0.25)


def test_names_that_nobody_knows_are_refused() -> None:
    @dataclass(frozen=True)
    class Wrong(Probe):
        requires: ClassVar[Any] = frozenset({"depth"})

    with pytest.raises(
        ValueError, match="Wrong.requires names 'depth': choose from Input.FEATURES, Input.GRID, Input.HEAD_IMPORTANCE"
    ):
        Wrong()


def test_a_reduced_tower_has_no_rows_to_read() -> None:
    @duet_vlm.register("probe_of_states")
    @dataclass(frozen=True)
    class States(Probe):
        paper = summary = "probe"
        requires: ClassVar[frozenset[Input]] = VISION_LAYER_INPUTS | {Input.PROJECTED_FEATURES}

    try:
        with pytest.raises(
            TypeError,
            match="uses the output of blocks of the vision tower, which a reduced tower has for some patches only",
        ):
            duet_vlm.attach(shared("llava"), "contrast+probe_of_states", budget=0.3)
    finally:
        registry._methods.pop("probe_of_states", None)
