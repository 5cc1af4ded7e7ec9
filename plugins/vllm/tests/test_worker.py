"""The worker's side without any engine: what is refused before weights are read, and the arithmetic around the tower."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from duet_vlm_vllm.grids import from_columns, in_columns
from duet_vlm_vllm.llava import Tower
from duet_vlm_vllm.llava_onevision import DuetLlavaOnevision
from duet_vlm_vllm.settings import served
from duet_vlm_vllm.tower import batches, budgets, check_engine, layer_of

import duet_vlm


def config(compilation: dict[str, Any] | None = None, **multimodal: Any) -> Any:
    """As much of vLLM's settings as is looked at."""
    model = SimpleNamespace(multimodal_config=SimpleNamespace(**multimodal))
    return SimpleNamespace(compilation_config=SimpleNamespace(**compilation or {}), model_config=model)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"compilation": {"cudagraph_mm_encoder": True}}, "cudagraph_mm_encoder: a captured or compiled vision tower"),
        ({"compilation": {"compile_mm_encoder": True}}, "compile_mm_encoder: a captured or compiled vision tower"),
        ({"mm_encoder_tp_mode": "data"}, "--mm-encoder-tp-mode data: each rank would see"),
    ],
)
def test_towers_that_show_nobody_their_attention_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_engine(config(**given))
    check_engine(config({"cudagraph_mm_encoder": False}, mm_encoder_tp_mode="weights"))


class SiglipVisionModel:
    pass


class CLIPVisionModel:
    pass


@pytest.mark.parametrize(
    ("kind", "tower", "strategy", "says"),
    [
        (Tower, SiglipVisionModel(), "default", "SiglipVisionModel with 'default' features: .*CLIP towers and 'default' features only"),
        (Tower, CLIPVisionModel(), "full", "CLIPVisionModel with 'full' features: .*CLIP towers"),
        (DuetLlavaOnevision, CLIPVisionModel(), "full", "CLIPVisionModel with 'full' features: .*Siglip towers and 'full' features only"),
        (DuetLlavaOnevision, SiglipVisionModel(), "default", "SiglipVisionModel with 'default' features: .*Siglip towers"),
    ],
)
def test_other_towers_are_refused_by_name(kind: Any, tower: Any, strategy: str, says: str) -> None:
    theirs = SimpleNamespace(vision_feature_select_strategy=strategy)
    model = SimpleNamespace(vision_tower=tower, config=theirs, kind=kind.kind, strategy=kind.strategy)
    with pytest.raises(ValueError, match=says):
        Tower.begin(model, config())


def test_a_model_without_settings_says_how_to_give_them() -> None:
    with pytest.raises(ValueError, match="--hf-overrides"):
        served(SimpleNamespace(), "compact")


@pytest.mark.parametrize(("asked", "layer"), [(None, 20), (-1, 22), (0, 0), (-23, 0), (22, 22)])
def test_the_layer_that_ranks(asked: int | None, layer: int) -> None:
    """Of 23 layers, all of which are built."""
    assert layer_of(duet_vlm.get("visionzip")(dominant=9, signal_layer=asked), 20, 23, 23) == layer


@pytest.mark.parametrize("asked", [23, -24, -1, 22])
def test_a_layer_that_is_not_built_is_an_error(asked: int) -> None:
    with pytest.raises(ValueError, match=rf"signal_layer={asked}: vLLM runs layers 0 to 21"):
        layer_of(duet_vlm.get("visionzip")(dominant=9, signal_layer=asked), 20, 23, 22)


def test_images_go_through_the_tower_in_runs_that_memory_was_measured_for() -> None:
    assert batches([], 9) == []
    assert batches([4, 4, 4, 9, 1, 30, 1], 9) == [range(0, 2), range(2, 3), range(3, 4), range(4, 5), range(5, 6), range(6, 7)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        counts = torch.randint(1, 40, (12,), generator=generator).tolist()
        runs = batches(counts, 50)
        assert [number for run in runs for number in run] == list(range(12))
        assert all(len(run) == 1 or sum(counts[run.start : run.stop]) <= 50 for run in runs)
        assert all(sum(counts[run.start : run.stop + 1]) > 50 for run in runs[:-1])  # none could have taken the next image, too


def test_budgets_of_requests_arrive_as_they_were_sent() -> None:
    assert budgets(None, 2) == [-1.0, -1.0]
    assert budgets(torch.tensor([[6.0], [0.05]], dtype=torch.float64), 2) == [6.0, 0.05]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_places_on_the_grid_survive_any_floating_point_type(dtype: torch.dtype) -> None:
    """257 has no bfloat16 of its own."""
    places = torch.arange(0, 4 * 16384).view(-1, 4)
    rows = torch.cat([torch.randn(len(places), 5), in_columns(places)], 1).to(dtype)
    assert torch.equal(from_columns(rows), places.T)
