"""A saved setting with an old name or value is refused with the name and value of today, wherever it comes from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from families import shared
from report_data import made_up
from typer.testing import CliRunner

import duet_vlm
from duet_vlm.cli.main import app
from duet_vlm.evaluation.report.check import check
from duet_vlm.methods.decoder.fastv import FastV
from duet_vlm.reducers.options import NAMES as OPTION_NAMES
from duet_vlm.utils.renamed_settings import NAMES, OPTIONS

PICTURE = Path(duet_vlm.__file__).parent / "evaluation/tiny/demo/scene_1.png"
MOVED = [  # once settings of every method, by names of then and of now
    ("contrast", {"mass": False}, "proportional_attention", False),
    ("contrast", {"context": 3}, "pooled_context_tokens", 3),
    ("duet", {"keep_predicting": False}, "protect_predicting_tokens", False),
    ("duet", {"share": "each"}, "multi_image", "per_image"),
    ("duet", {"parts": "each"}, "crops", "per_crop"),
    ("duet", {"parts": "joint"}, "crops", "joint"),
    ("duet", {"cache": "cut"}, "trim_kv_cache", True),
    ("duet", {"cache": "full"}, "trim_kv_cache", False),
    ("duet", {"clamp_below": 0}, "small_image_tokens", 0),
    ("duet", {"newline": "keep"}, "newline_tokens", "keep"),
    ("fastv", {"multi_image": "each"}, "multi_image", "per_image"),
    ("scope", {"crops": "each"}, "crops", "per_crop"),
    ("fastv", {"trim_kv_cache": "cut"}, "trim_kv_cache", True),
    ("fastv", {"text_query": "all"}, "text_query", "all"),
    ("duet", {"positions": "compact"}, "positions", "compact"),
    ("duet", {"skip_unanswered": True}, "skip_unanswered", True),
    ("contrast+duet", {"contrast_mass": False}, "proportional_attention", False),
    ("contrast+duet", {"parts": "each"}, "crops", "per_crop"),
]
OLD: list[tuple[str, dict[str, Any], str]] = [
    (method, settings, f"give options=TokenOptions({new}={today!r}), as text options.{new}={today}")
    for method, settings, new, today in MOVED
]


def test_every_old_name_has_a_new_one_that_some_method_has() -> None:
    made = [cls() for cls in duet_vlm.list_methods().values()]
    known = {name for method in made for name in (*method.settings(), *method.known_options())}
    assert known >= set(NAMES.values()) | OPTIONS and set(OPTION_NAMES) >= OPTIONS


@pytest.mark.parametrize(("method", "settings", "advice"), [row for row in OLD if "+" not in row[0]])
def test_a_class_says_the_new_name(method: str, settings: dict[str, Any], advice: str) -> None:
    with pytest.raises(ValueError) as error:
        duet_vlm.get_method(method)(**settings)
    assert str(error.value).startswith(f"{method}: ") and str(error.value).endswith(advice)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        duet_vlm.get_method(method)(colour=3)


def test_a_field_with_the_name_of_an_option_is_refused() -> None:
    @dataclass(frozen=True)
    class Old(FastV):
        text_query: str = "all"

    with pytest.raises(
        TypeError, match=r"text_query is an option .* write default_options = TokenOptions\(text_query="
    ):
        Old()


def test_old_values_of_options_are_refused_with_those_of_today() -> None:
    for options, advice in (
        ({"multi_image": "each"}, "give multi_image='per_image'"),
        ({"parts": "each"}, "give crops='per_crop'"),
        ({"cache": "cut"}, "give trim_kv_cache=True"),
    ):
        with pytest.raises(ValueError, match=advice):
            duet_vlm.attach(shared("llava"), "duet", budget=0.5, options=options)


@pytest.mark.parametrize(("method", "settings", "advice"), OLD)
def test_attach_says_the_new_name(method: str, settings: dict[str, Any], advice: str) -> None:
    with pytest.raises(ValueError) as error:
        duet_vlm.attach(shared("llava"), method, budget=0.5, **settings)
    (name,) = settings
    assert str(error.value).startswith(f"{method}: {name}=") and str(error.value).endswith(advice)


def test_a_name_that_a_method_has_today_is_none_of_the_old_ones() -> None:
    assert duet_vlm.get_method("fastvid")(context=0.25).settings()["context"] == 0.25
    with duet_vlm.attach(shared("llava"), "fastvid", budget=0.5, context=0.25) as handle:
        assert handle.reducer.settings()["context"] == 0.25


@pytest.mark.parametrize(
    ("given", "new"),
    [
        ("keep_predicting=False", "options.protect_predicting_tokens=False"),
        ("text_query=last", "options.text_query=last"),
    ],
)
def test_the_command_line_says_the_new_name(given: str, new: str) -> None:
    made = CliRunner().invoke(
        app,
        ["run", "-i", str(PICTURE), "-p", "What color is the ring?", "-b", "64", "--method", "duet", "--set", given],
    )
    assert made.exit_code == 2 and f"as text {new}" in " ".join(made.output.split())


def test_a_method_file_says_the_new_name(tmp_path: Path) -> None:
    file = tmp_path / "duet.json"
    file.write_text(json.dumps({"method": "duet", "budget": 0.5, "settings": {"parts": "each"}}))
    with pytest.raises(
        ValueError,
        match=r"parts='each' is an old way to write a setting: give options=TokenOptions\(crops='per_crop'\)",
    ):
        duet_vlm.attach(shared("llava"), str(file))


def test_the_config_of_a_checkpoint_says_the_new_name() -> None:
    model = shared("llava")
    model.config.duet_vlm = {"method": "duet", "budget": 0.5, "settings": {"clamp_below": 0}}
    try:
        with pytest.raises(
            ValueError, match=r"clamp_below=0 is an old way .*: give options=TokenOptions\(small_image_tokens=0\)"
        ):
            duet_vlm.attach(model)
    finally:
        del model.config.duet_vlm


@pytest.mark.parametrize(("method", "settings", "advice"), OLD)
def test_a_result_file_says_the_new_name(method: str, settings: dict[str, Any], advice: str) -> None:
    result = made_up(3, (0.5,))
    result["runs"][1] |= {"method": "fastvid", "settings": {"context": 0.4}}  # its own setting of that name
    check(result, "results/old.json")
    result["runs"][1] |= {"method": method, "settings": settings}
    with pytest.raises(ValueError) as error:
        check(result, "results/old.json")
    assert str(error.value).startswith("results/old.json: run 1") and advice in str(error.value)
