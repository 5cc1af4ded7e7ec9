"""A prompt on paper: peaks of memory against the allocator, and ``duet-vlm budget`` from a config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from shapes import Shape, build, picture, prompt
from typer.testing import CliRunner

from duet_vlm.cli.main import app
from duet_vlm.evaluation import tiny
from duet_vlm.models.lookup import adapter_for
from duet_vlm.planning.budget import SpanPlan
from duet_vlm.profiling.flop_counter import memory_of
from duet_vlm.profiling.memory import prefill_peak_bytes, request_bytes, vision_peak_bytes
from duet_vlm.profiling.model_dims import DecoderDims, VisionDims
from duet_vlm.profiling.report import SampleCounts


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_peak_estimates_against_the_allocator(kv_heads: int) -> None:
    """Tower and decoder of a model without CLS, where no intermediate states are kept."""
    shape = Shape(
        family="qwen2_5_vl", layers=6, hidden=256, heads=8, kv_heads=kv_heads, mlp=704, vision_layers=4, vision_hidden=128, vision_mlp=512, side=16,
        text=40, vocab=500,
    )  # fmt: skip
    model, inputs, image = build(shape), prompt(shape), picture(shape)
    adapter = adapter_for(model)
    rows = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        features = model.get_image_features(**image)
        grid = {"image_grid_thw": image["image_grid_thw"]}
        tower, _ = memory_of(lambda: model.get_image_features(**image))
        decoder, _ = memory_of(
            lambda: model(**inputs, **grid, mm_encoder_outputs={"image": features}, logits_to_keep=1, use_cache=True)
        )
    assert vision_peak_bytes(adapter.vision_dims(), 4 * 256, 4) == pytest.approx(tower, rel=0.15)
    assert prefill_peak_bytes(adapter.decoder_dims(), rows, [rows] * 6, 256, 4) == pytest.approx(decoder, rel=0.15)


def test_a_request_holds_weights_and_the_cache_of_its_end() -> None:
    """LLaVA-1.5-7B in 16 bits: one more token to write is one more row in the caches of 32 layers."""
    decoder = DecoderDims(32, 4096, 32, 32, 128, 11008, 32064)
    vision = VisionDims(24, 1024, 4096, 2, 1, 1, 588, ((1024, 4096), (4096, 4096)))
    plan = SpanPlan(576, 64, 0, (64,) * 32)
    sample = SampleCounts(5000, (576,), ((576,),), (plan,), 5000, (plan.counts, plan.counts))
    row = 32 * 2 * 32 * 128 * 2
    one, more = (request_bytes(decoder, vision, 7 * 10**9, sample, new, 2) for new in (30001, 30002))
    assert more - one == row and one == 14e9 + (5064 + 30000) * row
    assert request_bytes(decoder, vision, 7 * 10**9, sample, 30001, 2, batch=3) == 14e9 + 3 * (one - 14e9)


def call(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["budget", *map(str, arguments)])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def test_a_config_is_enough(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_bytes((tiny.path() / "config.json").read_bytes())
    for place in (config, tmp_path):
        assert "some/name" in call("--model", "some/name", "--config-only", place, "-b", 64).stdout
    assert json.loads(call("--config-only", config, "-b", 64, "--json").stdout)["plan"]["tokens"] == 256
    assert "no such file" in call("--config-only", tmp_path / "other.json", "-b", 64, code=2).stderr
    config.write_text("{}")
    assert "--config-only" in call("--config-only", config, "-b", 64, code=2).stderr


def test_tiles_are_spans_with_budgets_of_their_own(tmp_path: Path) -> None:
    """Five tiles of InternVL at a budget of 4 each: what a run of them reports (tests/test_bench.py) and by hand, 4 x 5
    at most."""
    FAMILIES["internvl"].make().config.save_pretrained(tmp_path)
    solved = json.loads(call("--config-only", tmp_path, "--parts", 5, "-b", 4, "--json").stdout)
    assert solved["plan"]["tokens"] == 5 * 16 and 15 < solved["mean_tokens"] <= 20


def test_seconds_on_a_device_are_asked_of_the_lab() -> None:
    assert "python -m duet_vlm_lab.fleet" in call("--device", "h100", "-b", 64, code=2).stderr
