"""Named presets: what they mean, from the published numbers and by hand, against what the solver and a model make of
them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration
from typer.testing import CliRunner

import duet_vlm
from duet_vlm.api.presets import PRESETS
from duet_vlm.cli.main import app
from duet_vlm.evaluation import tiny
from duet_vlm.evaluation.lmms.arguments import parse_arguments
from duet_vlm.evaluation.lmms.engine import Engine
from duet_vlm.inputs.images import open_image
from duet_vlm.methods.two_stage.duet import Duet
from duet_vlm.reducers.options import TokenOptions

PICTURE = tiny._HERE / "demo" / "scene_1.png"
QUESTION = "What color is the ring?"

# preset: (dominant with CLS, contextual, (tokens, layers), ...). Written out from the papers and the released scripts,
# never from the solver.
LLAVA, QWEN = 32, 28
BY_HAND: dict[str, tuple[int, int, tuple[tuple[int, int], ...]]] = {
    "duet-192": (300, 7, ((307, 16), (153, 8), (0, 8))),
    "duet-128": (170, 35, ((205, 16), (102, 8), (0, 8))),
    "duet-64": (85, 17, ((102, 16), (51, 8), (0, 8))),
    "duet-qwen2.5-vl-440": (540, 100, ((640, 14), (320, 7), (160, 7))),
    "duet-qwen2.5-vl-160": (212, 44, ((256, 14), (128, 7), (0, 7))),
    "duet-qwen2.5-vl-128": (170, 35, ((205, 14), (102, 7), (0, 7))),
    "duet-qwen2.5-vl-ratio": (832, 64, ((896, 7), (672, 7), (448, 7), (224, 7))),  # of 1280 tokens
    "duet-video-llava-960": (160, 32, ((192, 16), (96, 8), (0, 8))),  # of one frame
    "visionzip-192": (162, 30, ((192, 32),)),
    "visionzip-128": (108, 20, ((128, 32),)),
    "visionzip-64": (54, 10, ((64, 32),)),
    "pyramiddrop-270": (576, 0, ((576, 8), (288, 8), (144, 8), (72, 8))),
    "pyramiddrop-192": (576, 0, ((576, 2), (322, 6), (180, 8), (101, 16))),
    "pyramiddrop-128": (576, 0, ((576, 2), (241, 6), (101, 8), (42, 16))),
    "pyramiddrop-64": (576, 0, ((576, 2), (109, 6), (20, 8), (3, 16))),
    "pyramiddrop-reroute-192": (576, 0, ((576, 2), (259, 13), (129, 8), (64, 9))),
    "pyramiddrop-reroute-128": (576, 0, ((576, 2), (152, 13), (76, 8), (38, 9))),
    "pyramiddrop-reroute-84": (576, 0, ((576, 2), (80, 13), (40, 8), (20, 9))),
    "pyramiddrop-reroute-flat-192": (576, 0, ((576, 3), (152, 29))),
    "pyramiddrop-reroute-flat-128": (576, 0, ((576, 3), (81, 29))),
    "pyramiddrop-reroute-flat-64": (576, 0, ((576, 3), (11, 29))),
    "fastv-306": (576, 0, ((576, 2), (288, 30))),
    "fastv-171": (576, 0, ((576, 2), (144, 30))),
    "fastv-315": (576, 0, ((576, 3), (288, 29))),
}
PUBLISHED_MEANS = {  # as papers, READMEs and the authors' answers state them
    "duet-192": 192, "duet-128": 128, "duet-64": 64, "duet-qwen2.5-vl-160": 160, "duet-video-llava-960": 960 / 8,
    "visionzip-192": 192, "visionzip-128": 128, "visionzip-64": 64,
    "pyramiddrop-270": 270, "pyramiddrop-192": 192, "pyramiddrop-128": 128, "pyramiddrop-64": 62.9,
    "pyramiddrop-reroute-192": 191.5, "pyramiddrop-reroute-128": 127.4, "pyramiddrop-reroute-84": 84.1,
    "pyramiddrop-reroute-flat-192": 191.8, "pyramiddrop-reroute-flat-128": 127.4, "pyramiddrop-reroute-flat-64": 64,
}  # fmt: skip


def test_every_preset_is_written_out_here() -> None:
    assert set(PRESETS) == set(BY_HAND)
    assert all(PRESETS[name].reducer.name == name.split("-")[0] for name in PRESETS)


@pytest.mark.parametrize("name", BY_HAND)
def test_counts_and_mean(name: str) -> None:
    dominant, contextual, runs = BY_HAND[name]
    counts = tuple(tokens for tokens, layers in runs for _ in range(layers))
    row = PRESETS[name]
    assert len(counts) == row.depth == (QWEN if "qwen" in name else LLAVA)
    plan = row.reducer.plan(row.tokens, row.depth, None)
    assert (plan.dominant, plan.contextual, plan.counts) == (dominant, contextual, counts)
    assert row.mean == sum(tokens * layers for tokens, layers in runs) / row.depth
    assert row.mean == pytest.approx(PUBLISHED_MEANS.get(name, row.mean), abs=0.6)


@pytest.mark.parametrize(("budget", "dominant", "contextual"), [(192, 300, 7), (128, 170, 35), (64, 85, 17)])
def test_a_duet_budget_solves_to_the_counts_of_its_preset(budget: int, dominant: int, contextual: int) -> None:
    solved, named = Duet().plan(576, 32, budget), PRESETS[f"duet-{budget}"].reducer.plan(576, 32, None)
    assert (solved.dominant, solved.contextual) == (dominant, contextual)
    assert solved == named


@pytest.mark.parametrize(("method", "preset", "budget"), [("visionzip", f"visionzip-{n}", n) for n in (192, 128, 64)])
def test_a_visionzip_budget_solves_to_the_counts_of_its_preset(method: str, preset: str, budget: int) -> None:
    assert duet_vlm.make_method(method).plan(576, 32, budget) == PRESETS[preset].reducer.plan(576, 32, None)


PYRAMIDS = [name for name in PRESETS if name.startswith("pyramiddrop") and "reroute" not in name]


@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_pyramiddrop_budget_solves_to_the_counts_of_its_preset(name: str) -> None:
    """At the mean that a preset has; at the number that it is known by to within a token per layer, as its shares have
    two digits."""
    row, method = PRESETS[name], duet_vlm.get_method("pyramiddrop")()
    named = row.reducer.plan(576, 32, None).counts
    assert method.plan(576, 32, row.mean / row.tokens).counts == named
    solved = method.plan(576, 32, int(name.split("-")[1])).counts
    assert all(0 <= b - a <= 1 for a, b in zip(named, solved, strict=True))


def test_qwen_160_is_what_the_solver_gives() -> None:
    assert Duet().plan(1280, 28, 160) == PRESETS["duet-qwen2.5-vl-160"].reducer.plan(1280, 28, None)


@pytest.mark.parametrize(
    "name", [n for n in PRESETS if PRESETS[n].model == "LLaVA-1.5-7B" and n.split("-")[0] in ("duet", "visionzip")]
)
def test_llava_presets_behave_as_released(name: str) -> None:
    settings = duet_vlm.preset(name).settings()
    assert (
        settings["options"]["cls_token"]
        and settings["options"]["positions"] == "compact"
        and settings["merge"] == "anchor_plus_mean"
    )


def test_fields_of_a_preset_can_be_overridden() -> None:
    model = shallow(32)
    with duet_vlm.attach(model, duet_vlm.preset("duet-64"), options=TokenOptions(text_query="last")) as handle:
        assert handle.reducer.settings()["options"]["text_query"] == "last" and handle.plan(256).mean == 63.75


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"unknown preset 'duet-65' \(did you mean 'duet-64'\?\); known presets: duet-192, .*fastv-315"
    ):
        duet_vlm.preset("duet-65")


# ---- on a model: the embedded one's shape with 32 decoder layers, random weights


def shallow(depth: int) -> Any:
    config = LlavaConfig.from_pretrained(tiny.path())
    config.text_config.num_hidden_layers = depth
    config.text_config.layer_types = ["full_attention"] * depth
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    for file in tiny.path().glob("*.json*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_bytes((tiny.path() / "chat_template.jinja").read_bytes())
    shallow(32).save_pretrained(folder)
    return folder


def call(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


@pytest.mark.parametrize(
    ("name", "mean"), [("duet-64", 63.75), ("duet-128", 128.0), ("visionzip-64", 64.0), ("fastv-306", 136.0)]
)
def test_a_model_measures_what_a_preset_plans(deep: Path, name: str, mean: float) -> None:
    """Counts hold for any image with enough tokens; FastV's share is of the 256 that this model has: (2 * 256 + 30 *
    128) / 32."""
    got = json.loads(
        call(
            "run", "-m", deep, "-i", PICTURE, "-p", QUESTION, "--preset", name, "--max-new-tokens", "2", "--json"
        ).stdout
    )
    assert got["report"]["measured_mean"] == got["report"]["nominal_mean"] == mean
    assert got["report"]["budget"] is None and got["report"]["method"] == name.split("-")[0]


def test_viz_and_budget_take_presets_too(deep: Path, tmp_path: Path) -> None:
    got = json.loads(
        call("viz", "-m", deep, "-i", PICTURE, "-p", QUESTION, "--preset", "duet-64", "-o", tmp_path, "--json").stdout
    )
    assert got["mean_tokens"] == 63.75
    assert [Path(file).name for file in got["files"]] == ["1-scene_1-preset-duet-64.png"]
    with Image.open(got["files"][0]) as sheet:
        assert sheet.width > 4 * 352
    planned = json.loads(call("budget", "-m", deep, "--preset", "duet-64", "--json").stdout)
    assert planned["mean_tokens"] == 63.75 and planned["settings"]["options"]["cls_token"]
    assert "85 kept + 17 merged" in call("budget", "-m", deep, "--preset", "duet-64").stdout


def test_harness_models_take_presets(deep: Path, tmp_path: Path) -> None:
    engine = Engine(str(deep), parse_arguments(None, None, "duet-64", {}), device="cpu")
    content = [{"type": "image", "image": open_image(PICTURE)}, {"type": "text", "text": QUESTION}]
    engine.answer("questions", [[{"role": "user", "content": content}]], {"max_new_tokens": 2})
    engine.write(tmp_path / "m.json")
    counted = json.loads((tmp_path / "m.json").read_text())
    assert counted["label"] == "duet-64" and counted["settings"]["options"]["cls_token"] and counted["budget"] is None
    assert counted["tasks"]["questions"]["measured_mean"] == 63.75


VERBS = [("run", "-i", PICTURE, "-p", QUESTION), ("viz", "-i", PICTURE, "-p", QUESTION), ("budget",)]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
@pytest.mark.parametrize(
    "other",
    [("--method", "duet"), ("--budget", "64"), ("--set", "dominant=3"), ("--positions", "keep")],
    ids=lambda other: other[0],
)
def test_a_preset_stands_alone(verb: tuple[Any, ...], other: tuple[str, str]) -> None:
    message = call(*verb, "--preset", "duet-64", *other, code=2).stderr
    assert message == f"error: --preset duet-64 brings its method and all settings: leave out {other[0]}\n"


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_an_unknown_preset_lists_the_known_ones(verb: tuple[Any, ...]) -> None:
    message = call(*verb, "--preset", "duet", code=2).stderr
    assert (
        message.startswith("error: unknown preset 'duet' (did you mean 'duet-64'?); known presets: duet-192,")
        and message.count("\n") == 1
    )


def test_a_preset_for_a_larger_model_says_what_does_not_fit() -> None:
    assert (
        "dominant=300: this model's images have 256 visual tokens"
        in call("budget", "--preset", "duet-192", code=2).stderr
    )
    assert "layers 0..11" in call("budget", "--preset", "duet-64", code=2).stderr


def test_the_documentation_lists_every_preset_with_its_mean_and_source() -> None:
    page = (Path(__file__).parent.parent / "docs/reproduce-duet.md").read_text()
    rows = {
        cells[1].strip("` "): [c.strip() for c in cells]
        for line in page.splitlines()
        if len(cells := line.split("|")) == 8
    }
    assert {name for name in rows if "-" in name and name != "---"} == set(PRESETS)
    for name, row in PRESETS.items():
        assert rows[name][2] == row.model
        assert rows[name][4:7] == [f"{row.mean:g} of {row.tokens}", "yes" if row.published else "no", row.source]
