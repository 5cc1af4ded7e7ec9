"""Predicted seconds, bytes and devices: against arithmetic by hand, against real weights and measured peaks; and the
verb that prints them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, ONE
from test_flops import DECODERS
from typer.testing import CliRunner

import duet_vlm
from duet_vlm.evaluation import tiny
from duet_vlm.models.lookup import adapter_for
from duet_vlm.planning.budget import SpanPlan
from duet_vlm.profiling.model_dims import DecoderDims, ExpertDims, VisionDims, decoder_dims
from duet_vlm.profiling.report import SampleCounts
from duet_vlm_lab.fleet import app
from duet_vlm_lab.roofline import devices
from duet_vlm_lab.roofline.devices import SHEETS, Device
from duet_vlm_lab.roofline.predict import Assumptions, ModelCost, Workload, memory_bytes, predict
from duet_vlm_lab.roofline.weights import decoder_weights, layer_weights

DECODER = DecoderDims(32, 4096, 32, 32, 128, 11008, 32064)  # LLaVA-1.5-7B
VISION = VisionDims(24, 1024, 4096, 2, 1, 1, 588, ((1024, 4096), (4096, 4096)))
LLAVA_7B = ModelCost(DECODER, VISION)
IDEAL = Assumptions(compute=1, bandwidth=1, causal=1, hidden_touches=0, mlp_touches=0, usable=1, parallel=1)
SIMPLE = Device("simple", {"bf16": 1e15, "fp32": 1e14}, 1e13, 1e11, "made up")


def request(entry: int, new: int = 100, text: int = 64, depth: int = 32) -> Workload:
    plan = SpanPlan(576, entry, 0, (entry,) * depth)
    return Workload(SampleCounts(text, (576,), ((576,),), (plan,), text, (plan.counts, plan.counts)), new)


def test_a_7b_model_by_hand() -> None:
    """6.61 G weights of layers and head: compute-bound prefill, memory-bound decode."""
    found = predict(LLAVA_7B, request(576), SIMPLE, "bf16", 1, IDEAL)
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064
    kv = 2 * 32 * 4096 * 2 * (640 + 49)  # in the middle of 99 steps
    head = 4096 * 32064  # one row of it: what takes the time is reading it
    layers = 2 * 640 * (weights - head) + 32 * 4 * 640**2 * 4096
    assert found.prefill.seconds == pytest.approx(layers / 1e15 + 2 * head / 1e13, rel=0.001)
    assert found.step == pytest.approx((2 * weights + kv) / 1e13, rel=0.001)
    assert (found.prefill.bound, found.decode.bound) == ("compute", "memory")
    assert found.tokens_per_second == pytest.approx(100 / found.total)
    assert found.selection.seconds == 0


def test_the_prompt_gives_the_first_token() -> None:
    """generate() runs the decoder once for the prompt and once for each further token."""
    model, steps = FAMILIES["llava"].make().eval(), []
    model.generation_config.eos_token_id = None
    hook = model.model.language_model.register_forward_hook(lambda *ignored: steps.append(1))
    for new in (1, 2, 7):
        steps.clear()
        model.generate(**FAMILIES["llava"].inputs([ONE]), max_new_tokens=new, min_new_tokens=new, do_sample=False)
        work = request(576, new)
        found = predict(LLAVA_7B, work, SIMPLE)
        assert len(steps) == 1 + work.steps == new
        assert found.total == pytest.approx(found.first_token + work.steps * found.step)
        assert found.step == pytest.approx(predict(LLAVA_7B, request(576, 2), SIMPLE).step if new > 1 else 0, rel=0.01)
    hook.remove()
    rows = 32 * 2 * 32 * 128 * 2  # bytes of one row in the caches of all layers
    many, more = (memory_bytes(LLAVA_7B, request(576, new, text=5000), 2, 1) for new in (30001, 30002))
    assert more - many == rows


def test_a_reduced_prompt() -> None:
    full, reduced = (predict(LLAVA_7B, request(entry), SIMPLE, "bf16", 8, IDEAL) for entry in (576, 64))
    assert full.prefill.seconds / reduced.prefill.seconds == pytest.approx(640 / 128, rel=0.05)
    assert full.vision.seconds == reduced.vision.seconds  # the tower sees every patch
    assert 1 < full.step / reduced.step < 640 / 128
    assert reduced.max_batch > 3 * full.max_batch


def test_tower_layers_that_nobody_reads_take_time_in_the_full_model_only() -> None:
    model, work = ModelCost(DECODER, replace(VISION, unread=1)), request(64)
    skipped = replace(work, sample=replace(work.sample, skipped=True))
    whole, less = (predict(model, some, SIMPLE, "bf16", 1, IDEAL).vision for some in (work, skipped))
    layer = 8 * 577 * 1024**2 + 4 * 577 * 1024 * 4096 + 4 * 577**2 * 1024
    assert whole.flops - less.flops == layer and whole.seconds - less.seconds == pytest.approx(layer / 1e15)
    assert (
        predict(model, skipped.full(), SIMPLE, "bf16", 1, IDEAL).vision
        == predict(LLAVA_7B, request(576), SIMPLE, "bf16", 1, IDEAL).vision
    )
    # their weights are there all the same
    assert predict(model, skipped, SIMPLE).memory == predict(model, work, SIMPLE).memory


def test_selection_and_ranking_take_time_in_float32() -> None:
    plain = request(576)
    found = predict(LLAVA_7B, replace(plain, selection=10**12, selection_bytes=10**9), SIMPLE, "bf16", 2, IDEAL)
    assert found.selection.seconds == pytest.approx(2 * (1e12 / 1e14 + 1e9 / 1e13))
    ranked = predict(LLAVA_7B, replace(plain, scored_layers=(16,)), SIMPLE, "bf16", 2, IDEAL)
    projections = 2 * (2 * 640 * 4096**2 + 2 * 64 * 4096**2) / 1e15 + 2 * 2 * 640 * 4096 * 2 / 1e13
    extra = projections + 2 * 2 * 64 * 640 * 4096 / 1e14 + 2 * 24 * 32 * 64 * 640 / 1e13
    assert ranked.prefill.seconds - found.prefill.seconds == pytest.approx(extra, rel=0.001)
    once = predict(LLAVA_7B, replace(plain, scored_layers=(16,), reused_layers=(16,)), SIMPLE, "bf16", 2, IDEAL)
    # the keys of 640 rows, which the layer takes over
    assert ranked.prefill.flops - once.prefill.flops == 2 * 2 * 640 * 4096**2
    assert ranked.prefill.seconds - once.prefill.seconds == pytest.approx(2 * 2 * 640 * 4096**2 / 1e15, rel=0.001)


def test_memory_decides_the_batch_and_the_devices() -> None:
    work = request(576)
    found = predict(LLAVA_7B, work, SHEETS["l4"], "bf16")
    usable = found.devices * 24e9 * Assumptions().usable
    assert (
        memory_bytes(LLAVA_7B, work, 2, found.max_batch)
        <= usable
        < memory_bytes(LLAVA_7B, work, 2, found.max_batch + 1)
    )
    large = ModelCost(DecoderDims(80, 8192, 64, 8, 128, 29568, 152064), VISION)  # 72 G weights, 145 GB
    deep = request(576, depth=80)
    assert [predict(large, deep, SHEETS[name]).devices for name in ("l4", "a100", "h200", "mi300x")] == [8, 4, 2, 1]
    with pytest.raises(ValueError, match="do not fit"):
        predict(large, deep, SHEETS["l4"], batch=10**7)


def test_devices_for_a_load_are_whole_models() -> None:
    found = predict(LLAVA_7B, request(576), SHEETS["h200"], batch=8)
    rate = found.requests_per_second
    assert found.devices_for(0.5 * rate) == 1 and found.devices_for(2.5 * rate) == 3
    assert replace(found, devices=4).devices_for(2.5 * rate) == 12


def test_experts_are_read_as_far_as_they_are_visited() -> None:
    shape = DecoderDims(1, 64, 4, 2, 16, 96, 100, experts=ExpertDims(8, 2, 40))
    attention, router, expert = 64 * (2 * 64 + 2 * 32), 64 * 8, 3 * 64 * 40
    assert layer_weights(shape, 0) == attention + router + 8 * expert
    assert layer_weights(shape, 0, 1) == pytest.approx(attention + router + 2 * expert)
    assert layer_weights(shape, 0, 2) == pytest.approx(attention + router + 8 * (1 - 0.75**2) * expert)


@pytest.mark.parametrize("name", DECODERS)
def test_weights_of_decoders(name: str) -> None:
    kind, config = DECODERS[name]
    config.tie_word_embeddings = True
    assert decoder_weights(decoder_dims(config)) == pytest.approx(
        sum(p.numel() for p in kind(config).parameters()), rel=0.02
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_whole_models(family: str) -> None:
    model = FAMILIES[family].make()
    adapter = adapter_for(model)
    predicted = ModelCost(adapter.decoder_dims(), adapter.vision_dims()).numbers
    # norms, biases and positions weigh much at this size
    assert predicted == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.05)


# ---- sheets and the verb


def test_sheets_are_complete() -> None:
    for sheet in SHEETS.values():
        assert (
            {"bf16", "fp16", "fp32"} <= set(sheet.flops) and sheet.source.endswith("data sheet") and not sheet.measured
        )
        assert sheet.flops["bf16"] > sheet.flops["fp32"] > sheet.bandwidth > sheet.memory
    with pytest.raises(ValueError, match="b200"):
        devices.device("b200")
    with pytest.raises(ValueError, match="fp8"):
        SHEETS["a100"].peak("fp8")


def test_this_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    small = devices.measured(size=64, rounds=3, matrices=4, width=64)
    monkeypatch.setattr(devices, "measured", lambda: calls.append(1) or small)
    first, second = devices.device("cpu"), devices.device("cpu")
    assert first == second == small and len(calls) == 1 and first.measured
    assert Assumptions.of(first).compute == 1
    assert devices.this_machine(fresh=True) == small and len(calls) == 2


def test_each_machine_of_a_shared_home_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    speeds = iter(range(1, 9))
    monkeypatch.setattr(
        devices, "measured", lambda: Device("this CPU", {"fp32": float(next(speeds))}, 1.0, 1.0, "made up", True)
    )
    for name, speed in (("one", 1), ("other", 2), ("one", 1), ("other", 2)):
        monkeypatch.setattr(devices, "_processor", lambda name=name: name)
        assert devices.this_machine().flops == {"fp32": speed}


@pytest.mark.parametrize("half", ["", '{"name": "this CPU", "flo', '{"name": "this CPU"}', "null", "[1, 2]"])
def test_a_broken_file_of_this_machine_is_made_anew(half: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = Device("this CPU", {"fp32": 2.0}, 1.0, 1.0, "made up", True)
    monkeypatch.setattr(devices, "measured", lambda: small)
    devices.this_machine()
    (file,) = (tmp_path / "duet-vlm").iterdir()
    whole = file.read_text()
    file.write_text(half)
    assert devices.this_machine() == small and file.read_text() == whole
    assert list((tmp_path / "duet-vlm").iterdir()) == [file]  # nothing half-written is left beside it


def call(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def test_the_verb_prints_what_is_predicted() -> None:
    got = json.loads(call("--device", "h200", "--batch", 8, "--prompt-tokens", 60, "--new", 32, "--json").stdout)
    assert [row["budget"] for row in got["rows"]] == [None, 0.5, 0.33, 0.22, 0.11]
    assert got["assumed"] == vars(Assumptions()) and got["predicted"] is True
    times = [row["prediction"]["prefill"]["seconds"] for row in got["rows"]]
    assert times == sorted(times, reverse=True)
    model, _ = tiny.load()
    adapter = adapter_for(model)
    numbers = sum(p.numel() for p in model.parameters())
    plan = SpanPlan(256, 256, 0, (256,) * 12)
    work = Workload(SampleCounts(60, (256,), ((256,),), (plan,), 60, (plan.counts, plan.counts)), 32)
    same = predict(ModelCost(adapter.decoder_dims(), adapter.vision_dims(), numbers), work, SHEETS["h200"], "bf16", 8)
    assert got["rows"][0]["total"] == pytest.approx(same.total)


def test_a_config_is_enough(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_bytes((tiny.path() / "config.json").read_bytes())
    for place in (config, tmp_path):
        shown = call(
            "--model", "some/name", "--config-only", place, "--device", "l4", "-b", 64, "--compute-efficiency", 0.5
        ).stdout
        assert "some/name" in shown and "NVIDIA L4 data sheet" in shown and "50% of its FLOP/s" in shown


def test_sizes_that_are_free_are_named(tmp_path: Path) -> None:
    FAMILIES["qwen2_5_vl"].make().config.save_pretrained(tmp_path)
    assert "image of 1296 visual tokens" in " ".join(
        call("--config-only", tmp_path, "--device", "mi300x").stdout.split()
    )
    got = json.loads(
        call("--config-only", tmp_path, "--device", "mi300x", "--tokens", 800, "--parts", 8, "--json").stdout
    )
    assert got["request"]["parts"] == 8
    assert "choose a100" in call("--device", "toaster", code=2).stderr
    assert "--dtype int3" in call("--device", "l4", "--dtype", "int3", code=2).stderr


def test_tiles_are_spans_with_budgets_of_their_own(tmp_path: Path) -> None:
    """Five tiles of InternVL at a budget of 4 each: what ``duet-vlm budget`` plans (tests/test_planned.py)."""
    FAMILIES["internvl"].make().config.save_pretrained(tmp_path)
    options = ["--config-only", tmp_path, "--parts", 5, "-b", 4, "--json"]
    predicted = json.loads(call(*options, "--device", "l4").stdout)
    assert predicted["request"]["tokens"] == 5 * 16
    with duet_vlm.attach(FAMILIES["internvl"].make(), budget=4) as handle:
        assert predicted["rows"][1]["mean_tokens"] == 5 * handle.plan(16).mean


def test_budgets_below_a_floor_are_rows(tmp_path: Path) -> None:
    got = json.loads(call("--method", "pyramiddrop", "--device", "l4", "--json").stdout)
    assert all("total" in row or row["status"] == "infeasible" for row in got["rows"])
    floors = json.loads(call("--method", "fastv", "--device", "l4", "--json").stdout)["rows"]
    assert [row.get("status") for row in floors if row["budget"] == 0.11] in (["infeasible"], [None])
    assert duet_vlm.get_method("fastv")().plan(256, 12, 0.11).mean <= 0.11 * 256
