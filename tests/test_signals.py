"""What V2V looks at equals the tower's own attention maps and keys, image by image and in raster order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from families import (
    FAMILIES,
    FIRST,
    MIXED,
    ONE,
    THREE,
    Inputs,
    Picture,
    any_res_crops,
    any_res_layout,
    forward,
    pictures_of,
    shared,
)
from torch import Tensor, nn

import duet_vlm
from duet_vlm import EncoderView, Selection
from duet_vlm.evaluation.speed.prompts import encode
from duet_vlm.methods.two_stage.duet import Duet
from duet_vlm.models.lookup import adapter_for
from duet_vlm.ops.score import spread_indices
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions

seen: list[EncoderView] = []


@dataclass(frozen=True)
class Probe(Duet):
    """Duet that notes what it was shown."""

    name = "probe"

    def select_tokens(self, view: EncoderView) -> Selection:
        seen.append(view)
        return super().select_tokens(view)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    seen.clear()
    yield
    seen.clear()


def window_order(height: int, width: int, side: int = 2) -> list[int]:
    """Raster numbers of the merged tokens in the order of Qwen's tower: window by window."""
    order = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            order += [
                y * width + x for y in range(top, min(top + side, height)) for x in range(left, min(left + side, width))
            ]
    return order


def clip_signals(model: nn.Module, inputs: Inputs, layer: int) -> list[tuple[Tensor, Tensor]]:
    tower = model.model.vision_tower
    output = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    block = tower.encoder.layers[layer]
    key = block.self_attn.k_proj(block.layer_norm1(output.hidden_states[layer])).unflatten(-1, (4, 8)).mean(2)[:, 1:]
    return list(zip(output.attentions[layer][:, :, 0, 1:].sum(1), key, strict=True))


def crop_signals(model: nn.Module, inputs: Inputs, layer: int, pictures: list[Picture]) -> list[tuple[Tensor, Tensor]]:
    """CLS attention within each crop, in the order in which the crops are laid out, without newlines."""
    signals = []
    for picture, pixels in zip(pictures, inputs["pixel_values"], strict=True):
        crops = clip_signals(model, {"pixel_values": pixels[: 1 + math.prod(any_res_crops(picture))]}, layer)
        places = [place for place in any_res_layout(picture) if place is not None]
        signals.append(tuple(torch.stack([crops[crop][kind][patch] for crop, patch in places]) for kind in (0, 1)))
    return signals


def content_rows(family: str, picture: Picture) -> list[int]:
    """Numbers of the visual tokens that show the picture: all but newlines."""
    if family == "llava_next":
        return [i for i, place in enumerate(any_res_layout(picture)) if place is not None]
    return list(range(FAMILIES[family].tokens(picture)))


# the last (full-attention) block; CLIP: the one behind the feature layer
DEFAULT_LAYER = {"qwen2_vl": 2, "qwen2_5_vl": 3}


def tower_signals(
    family: str, inputs: Inputs, layer: int | None, pictures: list[Picture]
) -> list[tuple[Tensor, Tensor]]:
    """Importance and keys of the tokens that show each picture, from the tower's own attention maps."""
    model, layer = shared(family, "eager"), DEFAULT_LAYER.get(family, 2) if layer is None else layer
    with torch.no_grad():
        if FAMILIES[family].mrope:
            return qwen_signals(model, inputs, layer, pictures)
        return (
            crop_signals(model, inputs, layer, pictures)
            if family == "llava_next"
            else clip_signals(model, inputs, layer)
        )


def qwen_signals(
    model: nn.Module, inputs: Inputs, layer: int, pictures: list[Picture], sample: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    attention, caught = model.model.visual.blocks[layer].attn, []
    hook = attention.register_forward_pre_hook(lambda m, a, k: caught.append((a, k)), with_kwargs=True)
    model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    hook.remove()
    args, kwargs = caught[0]
    hidden = args[0] if args else kwargs["hidden_states"]
    cos, sin = (t[:, None] for t in kwargs["position_embeddings"])
    query, key = (
        t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin
        for t in attention.qkv(hidden).unflatten(-1, (3, 4, 8)).unbind(1)[:2]
    )
    signals, start = [], 0
    for picture in pictures:
        count = picture.height * picture.width
        q, k = (t[start : start + 4 * count].transpose(0, 1) for t in (query, key))
        asking = spread_indices(4 * count, sample, q.device)
        received = (q @ k.transpose(1, 2) * 8**-0.5).softmax(-1).mean(0)[asking].sum(0) * (4 * count / len(asking))
        by_window = received.view(count, 4).mean(1), k.mean(0).view(count, 4, 8).mean(1)
        order = window_order(picture.height, picture.width) if model.config.model_type == "qwen2_5_vl" else range(count)
        raster = torch.tensor(list(order)).argsort()
        signals.append((by_window[0][raster], by_window[1][raster]))
        start += 4 * count
    return signals


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("family", FIRST)
def test_importance_and_keys_are_those_of_the_tower(family: str, layer: int | None, attention: str) -> None:
    """By default the block behind the feature layer (CLIP, CLS row) or the last full-attention block (Qwen, column
    sums)."""
    inputs, pictures = FAMILIES[family].inputs(MIXED), pictures_of(MIXED)
    expected = tower_signals(family, inputs, layer, pictures)
    with duet_vlm.attach(
        shared(family, attention), Probe(dominant=0.4, contextual=0.2, options=TokenOptions(signal_layer=layer))
    ):
        forward(shared(family, attention), inputs)
    (view,) = seen
    assert view.importance is not None and view.keys is not None
    for row, (picture, (importance, keys)) in enumerate(zip(pictures, expected, strict=True)):
        content = content_rows(family, picture)
        assert view.valid[row].nonzero().flatten().tolist() == content
        torch.testing.assert_close(view.importance[row, content], importance, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(view.keys[row, content], keys, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_importance_from_some_of_the_rows_of_each_picture(family: str) -> None:
    inputs, pictures = FAMILIES[family].inputs(MIXED), pictures_of(MIXED)
    with torch.no_grad():
        expected = qwen_signals(shared(family, "eager"), inputs, DEFAULT_LAYER[family], pictures, 9)
    with duet_vlm.attach(shared(family), Probe(dominant=0.4, contextual=0.2, options=TokenOptions(signal_queries=9))):
        forward(shared(family), inputs)
    assert seen[0].importance is not None
    for row, (importance, _) in enumerate(expected):
        torch.testing.assert_close(seen[0].importance[row, : len(importance)], importance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_how_many_rows_ask_matters_where_there_is_no_cls_row(family: str) -> None:
    """None and more than there are: the same, bit for bit. Three: something else, except where one CLS row asks."""
    model, inputs = shared(family), FAMILIES[family].inputs([ONE])
    found = []
    for sample in (None, 10_000, 3):
        seen.clear()
        with duet_vlm.attach(model, Probe(dominant=0.4, contextual=0.2, options=TokenOptions(signal_queries=sample))):
            forward(model, inputs)
        assert seen[0].importance is not None
        found.append(seen[0].importance)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2]) == adapter_for(model).has_cls and bool((found[2][seen[0].valid] > 0).any())


@pytest.mark.parametrize("wrong", [0, -1])
def test_how_many_rows_ask_is_a_number_or_none(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"signal_queries={wrong}: a number of rows, at least 1, or None for all"):
        Duet(options=TokenOptions(signal_queries=wrong))


@pytest.mark.parametrize("family", FIRST)
def test_recording_leaves_the_features_alone(family: str) -> None:
    """Bit for bit, with the tower's own kernel: only a copy of query and key is looked at."""
    model, inputs = shared(family), FAMILIES[family].inputs([ONE])
    grids = [inputs[name] for name in ("image_grid_thw", "image_sizes") if name in inputs]
    with torch.no_grad():
        plain = model.model.get_image_features(inputs["pixel_values"], *grids, return_dict=True).pooler_output[0]
        with duet_vlm.attach(model, Probe(dominant=0.5, contextual=0)) as handle:
            names = ("pixel_values", "image_grid_thw", "image_sizes")
            reduced = encode(model, {name: inputs[name] for name in names if name in inputs})["image"].pooler_output[0]
            kept = ~reduced[:, 0].isnan()
            assert int(kept.sum()) == handle.plan(len(plain)).entry < len(plain)
    torch.testing.assert_close(reduced[kept], plain[kept], rtol=1e-5, atol=1e-6)


@dataclass(frozen=True)
class Patient(Probe):
    """The same, but it wants to see the rows it reduces."""

    name = "patient"
    requires = Duet.requires | {Input.FEATURES}


@pytest.mark.parametrize("family", FAMILIES)
def test_who_reads_no_features_chooses_before_they_are_there(family: str) -> None:
    """And chooses the same."""
    model, inputs = shared(family), FAMILIES[family].inputs([ONE, THREE])
    traces = []
    for method in (Probe, Patient):
        with duet_vlm.attach(model, method(dominant=0.4, contextual=0.2)) as handle:
            forward(model, inputs)
            traces.append(handle.trace)
    early, late = seen
    assert early.features is None and late.features is not None and late.features.shape[1] == late.valid.shape[1]
    assert torch.equal(early.valid, late.valid) and early.plans == late.plans
    assert traces[0] == traces[1]
