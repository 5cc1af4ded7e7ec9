"""The verb that measures: sides in turns, stages that add up, complete result files, pictures, and a model that is left
as it was."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, ONE, VIDEO, Picture, build
from typer.testing import CliRunner

import duet_vlm
from duet_vlm.cli.main import app
from duet_vlm.evaluation.planned_prompt import equal_parts, plan_prompt
from duet_vlm.evaluation.speed.paired import BenchPlan, BenchSide, result, sides_of
from duet_vlm.evaluation.speed.plots import draw, title
from duet_vlm.evaluation.speed.prompts import BenchPrompt, prompt_for
from duet_vlm.evaluation.speed.random_model import random_model
from duet_vlm.models.lookup import adapter_for
from duet_vlm.profiling.report import make_report

FAST = {"new": 3, "rounds": 2, "warmup": 0}


def hooks_of(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    model = build(request.param)
    inputs = FAMILIES[request.param].inputs([ONE])
    with torch.no_grad():
        before = model(**inputs).logits
    hooks = hooks_of(model)
    plan = BenchPlan(
        (*sides_of(["duet", "fastv", "random"], [0.5]), BenchSide("fastv", 1)), (1, 2), (9,), tokens=36, **FAST
    )
    out = result(request.param, model, plan, lambda line: None)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    assert hooks_of(model) == hooks
    return json.loads(json.dumps(out))


def test_every_side_has_a_row_per_batch(found: dict[str, Any]) -> None:
    measured = [(row["side"], row["batch"]) for row in found["rows"] if "ms" in row]
    assert sorted(measured) == sorted(
        (side, batch) for side in ("full", "duet at 50%", "fastv at 50%", "random at 50%") for batch in (1, 2)
    )
    floors = [row for row in found["rows"] if row.get("status") == "infeasible"]
    assert len(floors) == 2 and all(row["floor"] == 36 / 8 for row in floors)
    assert {"torch", "transformers", "threads", "cpu", "dtype", "commit", "attention"} <= set(found["environment"])


def test_stages_add_up(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        if "ms" not in row:
            continue
        ms = {name: spread["median"] for name, spread in row["ms"].items()}
        assert row["ms"]["prefill"]["low"] <= ms["prefill"] <= row["ms"]["prefill"]["high"]
        assert ms["vision"] > 0 and ms["projector"] > 0 and ms["decode step"] > 0
        assert ms["end to end"] > ms["decode step"]
        # two rounds: medians are means, and sums of means are means of sums
        assert ms["vision"] + ms["v2v"] + ms["projector"] + ms["prefill"] == pytest.approx(
            ms["to first token"], rel=0.01
        )
        layers = sum(group["ms"] for group in row["groups"]) + sum(row["before_layers_ms"])
        assert 0 < layers < ms["prefill"]


def test_rows_say_what_was_planned(found: dict[str, Any]) -> None:
    rows = {row["side"]: row for row in found["rows"] if "ms" in row and row["batch"] == 1}
    assert (
        rows["full"]["speed_up"]["prefill"] == {"median": 1, "low": 1, "high": 1} and rows["full"]["flops_bound"] == 1
    )
    assert [g["rows"] for g in rows["full"]["groups"]] == [46] and rows["full"]["t2v"] == []
    plan = duet_vlm.get_method("duet")().plan(36, 8, 0.5)
    assert [
        n for g in rows["duet at 50%"]["groups"] for n in [g["rows"] - 10] * (g["layers"][1] - g["layers"][0] + 1)
    ] == list(plan.counts)
    assert [stage["layer"] for stage in rows["duet at 50%"]["t2v"]] == [
        i for i in range(1, 8) if plan.counts[i] != plan.counts[i - 1]
    ]
    for row in rows.values():
        assert row["peak_bytes"] > row["kv_bytes"] > 0 and row["tokens"] == 36


def test_the_clocks_see_every_tower() -> None:
    """Video-LLaVA has a tower for images and one for clips."""
    model = build("video_llava")
    for frames in (0, 2):
        plan = BenchPlan(sides_of(["duet"], [0.5]), texts=(5,), frames=frames, memory=False, generate_rounds=0, **FAST)
        for row in result("video_llava", model, plan, lambda line: None)["rows"]:
            assert row["ms"]["vision"]["low"] > 0 and row["ms"]["projector"]["low"] > 0, (frames, row["side"])


def test_pictures(found: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = draw(found, tmp_path / "deep")
    assert {file.name for file in files} == {"time.png", "speed_up.png", "cache.png"}
    assert all(file.stat().st_size > 5000 for file in files)
    made = found["environment"]
    assert title(found).startswith(f"{found['model']}, {made['dtype']}, on {made['device']}")


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_for_every_family(family: str) -> None:
    """The stock model takes them, reads the picture, and every row of a batch is what the same picture and words are
    alone."""
    # these find an image by a mark on either side
    model, marks = build(family), 2 * family.startswith(("qwen3", "glm"))
    check_prompt(model, prompt_for(adapter_for(model), 2, 7), marks)


def check_prompt(model: Any, prompt: BenchPrompt, marks: int = 0) -> None:
    words, picture = (
        {key: value[: len(value) // 2] if isinstance(value, torch.Tensor) else value for key, value in part.items()}
        for part in (prompt.text, prompt.picture)
    )
    negative = {key: -value if key.startswith("pixel_values") else value for key, value in picture.items()}
    with torch.no_grad():
        logits = model(**prompt.text, **prompt.picture).logits
        alone, other = (model(**words, **shown).logits for shown in (picture, negative))
    assert logits.shape[:2] == (2, prompt.rows) == (2, prompt.tokens + 8 + marks)
    torch.testing.assert_close(logits, alone.expand_as(logits), rtol=1e-3, atol=1e-4)
    assert float((alone - other)[0, -1].abs().max()) > 1e-3


# what the nearest size is: of squares; of an overview of 4 x 4 and crops of 4 x 4, cut to an image of whole crops (56
# pixels), a newline per row (llava_onevision pools what is larger than one crop to 4 x 4, or 2 x 5 and 5 x 2 if it is
# twice as long); of a family with one size only
SIZES = {
    "qwen2_5_vl": (30, 25, 80, 81), "mistral3": (30, 25, 80, 81), "pixtral": (30, 25, 80, 81),
    "llava_next": (40, 36, 80, 88), "llava_next_video": (40, 36, 80, 88), "llava_onevision": (28, 28, 35, 36),
    "llava": (36, 36), "video_llava": (16, 16),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_pictures_have_the_size_that_was_asked_for(name: str) -> None:
    model, sizes = build(name), iter(SIZES[name])
    for asked, tokens in zip(sizes, sizes, strict=True):
        prompt = prompt_for(adapter_for(model), 2, 7, tokens=asked)
        assert (prompt.tokens, prompt.spans) == (tokens, (tokens,))
        check_prompt(model, prompt)


@pytest.mark.parametrize(("name", "message"), [
    ("llava", "has 36 visual tokens"), ("internvl", "has 16 visual tokens"), ("llava_next", "36 to 88 visual tokens"),
    ("pixtral", "4 to [0-9]+ visual tokens"),
])  # fmt: skip
def test_sizes_that_a_family_has_not(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"tokens=2000: .* {message} in this {name} model"):
        prompt_for(adapter_for(build(name)), 1, 5, tokens=2000)


# visual tokens of three frames: 16 per frame for a square of 48; frames of 4 x 4 and a CLS row; pooled to 2 x 2;
# pooled, and a newline behind
CLIPS = {
    "qwen2_vl": (48, 48), "qwen3_vl": (48, 48), "qwen3_5": (48, 48), "glm4v": (48, 48),
    "video_llava": (None, 3 * 17), "llava_next_video": (None, 3 * 4), "llava_onevision": (None, 3 * 4 + 1),
}  # fmt: skip
MARKS = {"qwen3_vl": 3 * 2, "qwen3_5": 3 * 2, "glm4v": 3 * 2 + 2}  # around each frame, and around the clip


@pytest.mark.parametrize("name", CLIPS)
def test_clips(name: str) -> None:
    asked, tokens = CLIPS[name]
    model = build(name)
    prompt = prompt_for(adapter_for(model), 2, 7, tokens=asked, frames=3)
    assert prompt.stream == "video" and prompt.spans == (tokens,)
    check_prompt(model, prompt, MARKS.get(name, 0))


def test_clips_that_a_family_has_not() -> None:
    with pytest.raises(ValueError, match="llava models take no videos"):
        prompt_for(adapter_for(build("llava")), 1, 5, frames=3)
    with pytest.raises(ValueError, match="a clip of 3 frames has 51 visual tokens"):
        prompt_for(adapter_for(build("video_llava")), 1, 5, tokens=48, frames=3)


# the spans that a prompt really has, and the layers that rank: hybrid layers (LFLLFLLF) let several drops be ranked by
# one attention before them
@pytest.mark.parametrize(("name", "parts", "method", "settings", "scored"), [
    ("internvl", 5, "duet", {"budget": 4}, None),
    ("idefics3", 3, "duet", {"budget": 4}, None),
    ("llava", 2, "duet", {"budget": 8}, None),
    ("qwen3_5", 1, "duet", {"dominant": 8, "contextual": 2, "schedule": ((5, 0.5), (6, 0.2), (7, 0.1))}, (4, 7)),
    ("llava", 1, "pyramiddrop", {"budget": 0.6}, (2, 4, 6)),
    ("llava", 1, "fastv", {"budget": 0.5}, (1,)),
    # asks the tower's last layer, which is run for this alone
    ("llava", 1, "visionzip", {"budget": 8, "options": {"signal_layer": -1}}, ()),
])  # fmt: skip
def test_what_is_planned_is_what_runs(
    name: str, parts: int, method: str, settings: dict[str, Any], scored: tuple[int, ...] | None
) -> None:
    model, family = build(name), FAMILIES[name]
    pictures = [Picture(i, 4, 4) for i in range(parts)]
    each = family.tokens(pictures[0])
    with torch.no_grad(), duet_vlm.attach(model, method, **settings) as handle:
        model(**family.inputs([(1, *pictures, 5, 6, 7)]))
        real = handle.report()
        text = sum(token not in (IMAGE, VIDEO) for token in family.expand((1, *pictures, 5, 6, 7)))
        found = plan_prompt(handle, equal_parts(handle.adapter, parts * each, parts), text)
        run = handle._last_prompt()
        predicted = make_report(
            method="", settings={}, budget=handle.budget, samples=[found.sample], scored_layers=found.scored, reused_layers=found.reused,
            decoder=handle.adapter.decoder_dims(), vision=handle.adapter.vision_dims(), element_bytes=4, cache_bytes=None, decoded=0,
            projects_all=handle.projects_all, selection=handle.selection_flops([found.sample]),
        ).predicted  # fmt: skip
    assert (predicted.vision_flops, predicted.decoder_flops) == (
        real.observed.vision_flops,
        real.observed.decoder_flops,
    )
    assert found.sample.spans == (each,) * parts and found.sample.measured[0] == real.measured
    assert (found.scored, found.reused) == (run.record.scored_layers, run.record.reused_layers)
    assert scored is None or found.scored == scored


def test_crops_are_one_span_where_the_family_joins_them() -> None:
    assert equal_parts(adapter_for(build("llava_next")), 100, 3) == ((33, 33, 34),)
    assert equal_parts(adapter_for(build("qwen2_vl")), 100, 2) == ((50, 50),)
    assert equal_parts(adapter_for(build("internvl")), 48, 3) == ((16,), (16,), (16,))


def test_ranking_needs_a_layer_with_attention_in_front() -> None:
    # one layer of full width is all that this pays for: a linear one
    with duet_vlm.attach(build("qwen3_5"), "fastv", budget=0.2) as handle:
        with pytest.raises(ValueError, match="no attention to rank tokens by"):
            plan_prompt(handle, ((64,),), 5)


def test_random_models_come_from_a_config_alone(tmp_path: Path) -> None:
    model = FAMILIES["llava_gqa"].make()
    model.config.save_pretrained(tmp_path)
    made = random_model(tmp_path)
    assert type(made) is type(model) and not made.training and next(made.parameters()).device.type == "cpu"
    assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in model.parameters())
    assert all(torch.isfinite(p).all() for p in made.parameters())
    with pytest.raises(ValueError, match="no such file"):
        random_model(tmp_path / "nothing")


# ---- the verb


def call(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "150"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def test_the_verb(tmp_path: Path) -> None:
    FAMILIES["llava"].make().config.save_pretrained(tmp_path)
    words = [
        "--config-only",
        tmp_path,
        "--method",
        "duet",
        "-b",
        "0.5",
        "--rounds",
        1,
        "--new",
        2,
        "--batch",
        "1,2",
    ]
    shown = call(*words, "--out", tmp_path / "r" / "out.json", "--plots", tmp_path / "pictures").stdout
    assert "duet at 50%" in shown and "batch 2" in shown
    written = json.loads((tmp_path / "r" / "out.json").read_text())
    assert len(written["rows"]) == 4 and math.isfinite(written["rows"][1]["speed_up"]["prefill"]["median"])
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3
    printed = json.loads(call(*words[:-1], 1, "--batch", 2, "--prompt-tokens", 32, "--json").stdout)
    assert [(row["batch"], row["text"]) for row in printed["rows"]] == [
        (row["batch"], row["text"]) for row in written["rows"]
    ]
    assert [row["side"] for row in printed["rows"]] == [row["side"] for row in written["rows"]]


def printed_range(number: str) -> tuple[float, float]:
    """What a time may have been before it was rounded to three digits."""
    half = 0.5 * 10.0 ** (math.floor(math.log10(float(number))) - 2)
    return float(number) - half, float(number) + half


def test_printed_speed_ups_are_those_of_printed_times(tmp_path: Path) -> None:
    """By what stands on the screen alone; of a few rounds the median of ratios is another number than the ratio of
    medians."""
    FAMILIES["llava"].make().config.save_pretrained(tmp_path)
    words = [
        "--config-only",
        tmp_path,
        "--method",
        "duet,visionzip,fastv",
        "-b",
        "0.5,0.2",
        "--rounds",
        4,
        "--new",
        2,
    ]
    done = call(*words)
    wanted = r"(speed-up +by FLOPs)|(^(full|\w+ at) )"
    head, *rows = [line for line in done.stdout.splitlines() if re.search(wanted, line) and "infeasible" not in line]
    assert head.split()[-7:] == ["first", "token", "speed-up", "by", "FLOPs", "peak", "MiB"] and len(rows) >= 4
    full, *_ = times = [printed_range(row.split()[-4]) for row in rows]
    for taken, row in zip(times, rows, strict=True):
        ratio, half = float(row.split()[-3]), 0.005  # printed with two decimals
        assert full[0] / taken[1] - half <= ratio <= full[1] / taken[0] + half
    assert len({line for line in done.output.splitlines() if line.startswith("batch 1, ")}) == 1
    assert sum("visual and" in line for line in done.output.splitlines()) == 1  # on both streams together


def test_floors_are_written_for_people(tmp_path: Path) -> None:
    FAMILIES["llava"].make().config.save_pretrained(tmp_path)
    said = call("--config-only", tmp_path, "--method", "fastv", "-b", "1", "--rounds", 1, "--new", 2).stdout
    (line,) = [line for line in said.splitlines() if line.startswith("fastv at 1:")]
    assert re.fullmatch(r"fastv at 1: infeasible \(floor \d+\.\d\)", line)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    assert "choose one of" in call("--dtype", "int4", code=2).stderr
    assert "nosuch" in call("--method", "nosuch", code=2).stderr
    assert "did you mean 'fastv'" in call("--method", "duet,fstv", code=2).stderr
    assert "--batch 0: give whole numbers, at least 1" in call("--batch", "1,0", code=2).stderr
    assert "is a folder" in call("--out", tmp_path, code=2).stderr
    assert "--budget many" in call("-b", "many", code=2).stderr


@pytest.mark.parametrize("names", [["llava-1.5-7b"], pytest.param([], marks=pytest.mark.slow)])
def test_the_scripts_for_a_gpu_run_at_a_tiny_shape(names: list[str], tmp_path: Path) -> None:
    """End to end on the CPU: every case, complete rows, the largest batch, anchors that are marked as others' figures."""
    script = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run.py"
    words = [
        sys.executable,
        str(script),
        *names,
        "--device",
        "cpu",
        "--shape",
        "tiny",
        "--out",
        str(tmp_path / "gpu.json"),
    ]
    done = subprocess.run(
        words, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=300, capture_output=True, text=True
    )
    assert "not a comparison" in done.stdout and "SIEVE" in done.stdout
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["shape"] == "tiny" and len(found["cases"]) == (2 if names else 12)
    for case in found["cases"]:
        assert case["attention"] == "sdpa" == case["environment"]["attention"]
        assert {"full", "duet at 33%", "duet at 22%", "duet at 11%"} <= {
            row["side"] for row in case["rows"] if "ms" in row
        }
        assert all(("end to end" in row["ms"]) == ("largest_batch" in case) for row in case["rows"] if "ms" in row)
    assert set(found["cases"][0]["largest_batch"]) == {"full", "duet at 33%", "duet at 22%", "duet at 11%"}
    assert set(found["cases"][0]["largest_batch"].values()) == {2}
