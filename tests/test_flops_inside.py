"""Predicted FLOPs against what torch counts, within 1 %, where the tower is reduced, pictures are many, cut or joined,
and where nothing leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, Picture, Row, forward, shared
from torch import Tensor, nn

import duet_vlm
from duet_vlm.profiling.flop_counter import cache_bytes, count_flops
from duet_vlm.profiling.flops import tower_flops, vision_flops
from duet_vlm.profiling.model_dims import VisionDims

IMAGE: Row = (1, 2, Picture(1, 6, 8), 7, 8, 9, 10)
CUT: Row = (1, 2, Picture(1, 5, 7), 7, 8, 9, 10, 11)  # crops of which packing cuts lines off
SQUARE: Row = (1, 2, Picture(1, 4, 4), 7, 8, 9, 10, 11)  # crops that keep unlike many
SMALL: Row = (1, 2, Picture(1, 5, 4), 7, 8, 9, 10)
CLIP: Row = (1, 2, Picture(1, 5, 4, frames=3), 7, 8, 9, 10)
SEVERAL: Row = (1, Picture(1, 5, 4), 5, Picture(2, 4, 6), 6, Picture(3, 2, 3), 7, 8)

REDUCED: list[tuple[str, dict[str, Any]]] = [
    ("key_norm+prumerge", {"budget": 0.3}), ("tome_tower", {"budget": 0.5}), ("contrast+duet_plus", {"budget": 0.3}), ("motion", {"budget": 0.3}),
    ("evit+tokencarve", {"budget": 0.6}), ("tome_tower+holitom", {"budget": 0.3}), ("pixelprune", {}),
]  # fmt: skip
QUECC: tuple[str, dict[str, Any]] = ("quecc", {"keep": 0.4, "kernel": 2})
JOINED: list[tuple[str, dict[str, Any]]] = [
    ("none", {}), ("duet", {"budget": 0.3}), ("contrast", {"budget": 0.3}), ("evit", {"budget": 0.3}), ("tome_tower", {"budget": 0.5}),
    ("contrast+duet_plus", {"budget": 0.3}), ("zoo_prune", {"budget": 0.3}), QUECC,
]  # fmt: skip

CASES: list[tuple[str, str, dict[str, Any], Row]] = [
    *((family, method, {}, SMALL) for family in ("qwen2_vl", "qwen2_5_vl", "glm_ocr", "mistral3") for method in ("rlt", "pixelprune")),
    *((family, "rlt+duet_plus", {"budget": 0.3}, SMALL) for family in ("qwen2_vl", "glm4v")),
    *(("video_llava", method, {"budget": 0.15}, CLIP) for method in ("zoo_prune", "motion+zoo_prune", "contrast+zoo_prune")),
    *((family, *case, SQUARE) for family in ("llava_next_video", "llava_onevision") for case in REDUCED),
    *(("llava_next_video", *case, CUT) for case in REDUCED),
    *((family, *case, CLIP) for family in ("llava_next_video", "llava_onevision") for case in REDUCED if case[0] != "pixelprune"),
    *((family, *QUECC, row) for family in ("llava_next", "llava_next_video", "llava_onevision") for row in (SQUARE, CUT)),
    *((family, *QUECC, CLIP) for family in ("llava_next_video", "llava_onevision")),
    *((family, *case, SEVERAL) for family in ("pixtral", "mistral3", "mistral3_windows") for case in JOINED),
    *((family, "evit", {"budget": budget}, IMAGE) for family in ("qwen3_vl", "qwen3_vl_moe", "glm4v", "qwen3_5") for budget in (0.3, 0.6)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "method", "settings", "row"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_prompt_costs_what_was_predicted(family: str, method: str, settings: dict[str, Any], row: Row) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs([row])
    with torch.no_grad():
        stock = count_flops(lambda: model(**inputs, logits_to_keep=1))
        with duet_vlm.attach(model, method, **settings) as handle:
            counted = count_flops(lambda: model(**inputs, logits_to_keep=1))
            report = handle.report()
    assert report.full.flops == pytest.approx(stock, rel=0.01)
    assert report.observed.flops == pytest.approx(counted, rel=0.01)
    assert report.predicted.flops == pytest.approx(counted, rel=0.01)
    assert report.observed.kv_bytes == report.predicted.kv_bytes


@pytest.mark.parametrize("method", ["none", "duet", "contrast+duet_plus"])
def test_rows_of_a_batch_share_one_row_of_the_tower(method: str) -> None:
    model, inputs = shared("pixtral"), FAMILIES["pixtral"].inputs([SEVERAL, SEVERAL])
    with torch.no_grad(), duet_vlm.attach(model, method, **({} if method == "none" else {"budget": 0.3})) as handle:
        counted = count_flops(lambda: model(**inputs, logits_to_keep=1))
        assert handle.report().observed.flops == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "glm_ocr"])
@pytest.mark.parametrize("method", ["rlt", "pixelprune", "rlt+duet_plus", "contrast"])
@pytest.mark.parametrize("own", [False, True], ids=["prompt", "encoder"])
def test_patches_are_embedded_once(family: str, method: str, own: bool) -> None:
    """Whether some leave or none, and by whom the encoder is called; and what it hands out is what the stock model
    gives."""
    model, inputs, times = shared(family), FAMILIES[family].inputs([SMALL]), []
    seen = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    stock = _features(model, seen)
    (linear,) = (
        part
        for name, part in model.named_modules()
        if "visual.patch_embed" in name and isinstance(part, nn.Conv3d | nn.Linear)
    )
    hook = linear.register_forward_hook(lambda *_: times.append(1))
    with duet_vlm.attach(model, method, **({"budget": 0.3} if "+" in method or method == "contrast" else {})):
        if own:
            assert torch.equal(_features(model, seen), stock)
        else:
            forward(model, inputs)
    hook.remove()
    assert len(times) == 1


def _features(model: nn.Module, seen: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat(list(model.get_image_features(**seen).pooler_output))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_5", "gemma3"])
@pytest.mark.parametrize(
    ("method", "settings"), [("rlt", {}), ("contrast", {"keep": 1.0}), ("duet", {"budget": 1.0}), ("none", {})]
)
def test_the_cache_of_a_prompt_that_is_left_whole_is_measured(
    family: str, method: str, settings: dict[str, Any]
) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs([SMALL])
    with torch.no_grad(), duet_vlm.attach(model, method, **settings) as handle:
        cache = model(**inputs, use_cache=True).past_key_values
        report = handle.report()
        assert report.observed.kv_bytes == cache_bytes(cache)[0] == report.predicted.kv_bytes
        model(**inputs, use_cache=False)
        assert handle.report().observed.kv_bytes is None


def test_pictures_in_one_row_by_hand() -> None:
    """Two pictures of 5 and 3 tokens of four patches, one patch to spare and two of padding: two layers attend over 33
    rows, one over 4 + 8."""
    apart = VisionDims(3, 32, 48, 3, 4, 0, 96, ())
    joined = VisionDims(3, 32, 48, 3, 4, 0, 96, (), joined=True)
    parts = [(5, None, (), (1, 2)), (3, None, (), (0, 0))]
    assert tower_flops(apart, parts) == sum(vision_flops(apart, *part) for part in parts)
    assert tower_flops(joined, parts) - tower_flops(apart, parts) == 3 * 4 * 32 * (33**2 - 21**2 - 12**2)
    assert vision_flops(apart, 5, spare=(1, 2)) - vision_flops(apart, 5) == 2 * 3 * 96 * 32 + 3 * (
        8 * 32**2 + 6 * 32 * 48 + 4 * 32 * (21**2 - 20**2)
    )
    left = [(5, None, ((1, 2),), (1, 2)), (3, None, ((1, 1),), (0, 0))]
    assert tower_flops(joined, left) - tower_flops(apart, left) == 4 * 32 * (
        (32**2 - 20**2 - 12**2) + 2 * (12**2 - 8**2 - 4**2)
    )


def test_further_mergers_by_hand() -> None:
    """Two further mergers look behind blocks 1 and 2, the last one behind all three; of 9 tokens 6 are left after the
    first attention, then 2."""
    shape = VisionDims(3, 32, 48, 2, 4, 0, 96, ((128, 128), (128, 64)) * 3, deeper=(1, 2))
    part = (9, None, ((1, 6), (2, 2)), (0, 0))
    assert tower_flops(shape, [part]) - vision_flops(shape, *part) == 2 * 128 * (128 + 64) * (6 - 2)
