"""A checkpoint remembers the reduction it was trained with, if it is told to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, ONE, build, shared
from transformers import AutoModelForImageTextToText

import duet_vlm
from duet_vlm.reducers.options import TokenOptions

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("duet", {"budget": 0.3}),
    (
        "duet",
        {
            "dominant": 7,
            "contextual": 2,
            "schedule": ((3, 0.6), (5, 0.0)),
            "options": {"positions": "keep", "text_query": "last"},
        },
    ),
    ("fastv", {"keep": 0.25}),
    ("random", {"budget": 9, "seed": 3}),
    ("none", {}),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "options"), SETTINGS)
def test_what_was_attached_comes_back(family: str, method: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = build(family)
    inputs = FAMILIES[family].inputs([ONE])
    with duet_vlm.attach(model, method, **options) as handle, torch.no_grad():
        duet_vlm.save_to_config(handle)
        expected = model(**inputs).logits
        reducer, budget = handle.reducer, handle.budget
        model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert (
        duet_vlm.load_from_config(tmp_path)
        == duet_vlm.load_from_config(again)
        == duet_vlm.load_from_config(again.config)
    )
    with duet_vlm.attach(again) as handle, torch.no_grad():
        assert (handle.reducer, handle.budget) == (reducer, budget)
        torch.testing.assert_close(again(**inputs).logits, expected)


def test_what_is_named_goes_before_what_is_remembered() -> None:
    model = build("llava")
    with duet_vlm.attach(model, "duet", budget=0.3, options=TokenOptions(text_query="last")) as handle:
        duet_vlm.save_to_config(handle)
    with duet_vlm.attach(model, budget=0.2) as handle:
        assert (handle.reducer.name, handle.budget, handle.reducer.options.text_query) == ("duet", 0.2, "last")  # type: ignore[attr-defined]
    with duet_vlm.attach(model, options=TokenOptions(text_query="all")) as handle:
        assert (handle.budget, handle.reducer.options.text_query) == (0.3, "all")  # type: ignore[attr-defined]
    with duet_vlm.attach(model, "fastv", keep=0.5) as handle:
        assert (handle.reducer.name, handle.budget) == ("fastv", None)
    del model.config.duet_vlm
    assert duet_vlm.load_from_config(model) is None
    with pytest.raises(duet_vlm.BudgetError, match="duet needs a budget"):
        duet_vlm.attach(model)


def test_an_attached_model_that_was_not_told_saves_nothing_of_it(tmp_path: Path) -> None:
    model = shared("llava")
    model.save_pretrained(tmp_path / "before")
    with duet_vlm.attach(model, "duet", budget=0.3):
        model.save_pretrained(tmp_path / "attached")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "attached" / file).read_bytes()


@pytest.mark.parametrize("entry", ["duet", {"method": "duet"}, {"method": "duet", "budget": None, "settings": []}])
def test_entries_of_others_are_refused(entry: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"duet_vlm": entry}))
    with pytest.raises(ValueError, match=r"config.duet_vlm is .* expected budget, method, settings"):
        duet_vlm.load_from_config(tmp_path)


def test_folders_without_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config.json there"):
        duet_vlm.load_from_config(tmp_path)
