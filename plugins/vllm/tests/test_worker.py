"""The worker's side without any engine: what is refused before weights are read, and the arithmetic around the tower."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from duet_vlm_vllm.grids import from_columns, in_columns
from duet_vlm_vllm.llava import Tower
from duet_vlm_vllm.llava_onevision import DuetLlavaOnevision, frames_of
from duet_vlm_vllm.qwen2_5_vl import DuetQwen25VL
from duet_vlm_vllm.qwen2_vl import DuetQwen2VL
from duet_vlm_vllm.qwen3_vl import DuetQwen3VL
from duet_vlm_vllm.settings import served
from duet_vlm_vllm.tower import batches, budgets, check_engine, layer_of
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Qwen25VL
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration as Qwen2VL
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration as Qwen3VL

import duet_vlm
from duet_vlm.reducers.options import TokenOptions


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
        (
            Tower,
            SiglipVisionModel(),
            "default",
            "SiglipVisionModel with 'default' features: .*CLIP towers and 'default' features only",
        ),
        (Tower, CLIPVisionModel(), "full", "CLIPVisionModel with 'full' features: .*CLIP towers"),
        (
            DuetLlavaOnevision,
            CLIPVisionModel(),
            "full",
            "CLIPVisionModel with 'full' features: .*Siglip towers and 'full' features only",
        ),
        (
            DuetLlavaOnevision,
            SiglipVisionModel(),
            "default",
            "SiglipVisionModel with 'default' features: .*Siglip towers",
        ),
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
    assert (
        layer_of(duet_vlm.get_method("visionzip")(dominant=9, options=TokenOptions(signal_layer=asked)), 20, 23, 23)
        == layer
    )


@pytest.mark.parametrize("asked", [23, -24, -1, 22])
def test_a_layer_that_is_not_built_is_an_error(asked: int) -> None:
    with pytest.raises(ValueError, match=rf"signal_layer={asked}: vLLM runs layers 0 to 21"):
        layer_of(duet_vlm.get_method("visionzip")(dominant=9, options=TokenOptions(signal_layer=asked)), 20, 23, 22)


def test_images_go_through_the_tower_in_runs_that_memory_was_measured_for() -> None:
    assert batches([], 9) == []
    assert batches([4, 4, 4, 9, 1, 30, 1], 9) == [
        range(0, 2),
        range(2, 3),
        range(3, 4),
        range(4, 5),
        range(5, 6),
        range(6, 7),
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        counts = torch.randint(1, 40, (12,), generator=generator).tolist()
        runs = batches(counts, 50)
        assert [number for run in runs for number in run] == list(range(12))
        assert all(len(run) == 1 or sum(counts[run.start : run.stop]) <= 50 for run in runs)
        # none could have taken the next image, too
        assert all(sum(counts[run.start : run.stop + 1]) > 50 for run in runs[:-1])


def test_budgets_of_requests_arrive_as_they_were_sent() -> None:
    assert budgets(None, 2) == [-1.0, -1.0]
    assert budgets(torch.tensor([[6.0], [0.05]], dtype=torch.float64), 2) == [6.0, 0.05]


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_rows_of_a_pooled_clip_show_its_frames_and_a_newline(frames: int) -> None:
    assert frames_of(frames, 4 * frames + 1).tolist() == [frame for frame in range(frames) for _ in range(4)] + [-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_places_on_the_grid_survive_any_floating_point_type(dtype: torch.dtype) -> None:
    """257 has no bfloat16 of its own."""
    places = torch.arange(0, 4 * 16384).view(-1, 4)
    rows = torch.cat([torch.randn(len(places), 5), in_columns(places)], 1).to(dtype)
    assert torch.equal(from_columns(rows), places.T)


GRIDS = {"qwen2_vl": (DuetQwen2VL, Qwen2VL), "qwen2_5_vl": (DuetQwen25VL, Qwen25VL), "qwen3_vl": (DuetQwen3VL, Qwen3VL)}


class Letters:
    """A tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [100 + ord(letter) for letter in text]


def without_weights(kind: str) -> Any:
    model = object.__new__(GRIDS[kind][0])
    torch.nn.Module.__init__(model)
    vision = SimpleNamespace(spatial_merge_size=2, **({"tokens_per_second": 2} if kind == "qwen2_5_vl" else {}))
    model.config = SimpleNamespace(
        image_token_id=1, video_token_id=2, vision_start_token_id=3, vision_end_token_id=4, vision_config=vision
    )
    model._tokenizer = Letters()
    model.get_language_model = lambda: SimpleNamespace(embed_input_ids=lambda ids: torch.zeros(len(ids), 5))
    return model


@pytest.mark.parametrize("kind", list(GRIDS))
@pytest.mark.parametrize("seed", range(8))
def test_positions_of_prompts_that_are_kept_whole_are_those_of_vllm(kind: str, seed: int) -> None:
    """Pictures and clips, long ones too, in any order; however the prompt is cut into steps, and each of them done
    twice."""
    draw = random.Random(seed)
    model, stock, features, held = without_weights(kind), [], [], []
    ours: list[int] = []
    for _ in range(draw.randint(1, 4)):
        clip = draw.random() < 0.6
        grid, clock = (
            [draw.randint(1, 9) if clip else 1, 2 * draw.randint(1, 4), 2 * draw.randint(1, 4)],
            draw.choice([0.25, 0.5, 1.0, 1.5]),
        )
        steps = [second * clock for second in range(grid[0])]
        text = [9] * draw.randint(0, 5) + [3]
        rows = [2 if clip else 1] * (math.prod(grid) // 4)
        shown = rows
        if clip and kind == "qwen3_vl":
            step = len(rows) // grid[0]
            shown = [
                token
                for second in steps
                for token in (*Letters().encode(f"<{second:.1f} seconds>"), 3, *rows[:step], 4)
            ]
        name = "video" if clip else "image"
        data: dict[str, Any] = {f"{name}_grid_thw": SimpleNamespace(data=torch.tensor(grid))}
        if clip and kind != "qwen2_vl":
            told = {"qwen2_5_vl": ("second_per_grid_ts", torch.tensor(clock)), "qwen3_vl": ("timestamps", steps)}
            data[told[kind][0]] = SimpleNamespace(data=told[kind][1])
        place = SimpleNamespace(offset=len(stock) + len(text), length=len(shown))
        features.append(SimpleNamespace(modality=name, mm_position=place, data=data))
        written = model.written(
            name, grid, (steps if kind == "qwen3_vl" else clock) if clip and kind != "qwen2_vl" else None
        )
        held.append(model.in_prompt(torch.zeros(len(rows), 5), torch.arange(len(rows)), written))
        stock += [*text, *shown, 4]
        ours += [*text, *rows[:1] * len(shown), 4]
    theirs, delta = GRIDS[kind][1].get_mrope_input_positions(model, stock, features)
    positions, ahead = model.get_mrope_input_positions(ours, features)
    assert ahead == delta
    done = 0
    while done < len(ours):
        end = done + draw.randint(1, len(ours))
        some = [
            (rows, done - feature.mm_position.offset, end - feature.mm_position.offset)
            for rows, feature in zip(held, features, strict=True)
        ]
        pieces = [rows[max(first, 0) : max(last, 0)] for rows, first, last in some]
        for _ in range(2):
            left, positions, ahead = model.recompute_mrope_positions(
                ours, [rows for rows in pieces if len(rows)], positions, done
            )
            assert ahead == delta and all(rows.shape[1] == 5 for rows in left)
        done = end
    assert torch.equal(positions, theirs)
