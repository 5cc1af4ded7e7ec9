"""The front end's layout, without any engine: as many rows as ``attach`` lets in, as the family's stock processor makes
them otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from cases import ARCHITECTURES, CLIPS, METHODS, POSITIONS, REFUSED, REFUSES, STAMP, film, prompts
from engine import COMMON, shown
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache.base import MultiModalProcessorOnlyCache
from vllm.plugins import load_general_plugins

TILES = {
    "one": [1],
    "wide": [3],
    "tall, other text": [3],
    "two": [1, 3],
    "the same turned round": [3, 1],
    "three": [3, 1, 1],
    "no picture": [],
}

Processor = Callable[..., Any]


@pytest.fixture(scope="module")
def laid_out(family: str, checkpoints: dict[str, Path]) -> Processor:
    """A function from settings (None: stock vLLM) and a case to its prompt, as the processor of such a server lays it
    out."""

    load_general_plugins()

    @lru_cache
    def made(settings: str) -> tuple[Any, Any]:
        ours = (
            {"architectures": ["Duet" + ARCHITECTURES[family]], "duet": json.loads(settings)}
            if settings != "null"
            else {}
        )
        more = {name: COMMON[name] for name in ("dtype", "max_model_len", "limit_mm_per_prompt")}
        config = ModelConfig(str(checkpoints[family]), hf_overrides=ours, **more)
        return MULTIMODAL_REGISTRY.create_processor(config), MultiModalProcessorOnlyCache(config)

    def lay_out(settings: dict[str, Any] | None, case: str, cached: bool = False, **asked: Any) -> Any:
        processor, cache = made(json.dumps(settings))
        text, images, clips = prompts(family)[case]
        items = processor.info.parse_mm_data(shown(images, clips))
        return processor(text, mm_items=items, hf_processor_mm_kwargs=asked, cache=cache if cached else None)

    return lay_out


def rows(laid: Any) -> int:
    return len(laid["prompt_token_ids"])


def visual(laid: Any) -> list[int]:
    """Of each picture and then of each clip, the rows that embeddings will take; text that comes with them is left out."""
    placed, items = laid["mm_placeholders"], laid["mm_kwargs"]
    held = [pair for kind in sorted(placed) for pair in zip(placed[kind], items[kind], strict=True)]
    text = [
        STAMP * len(item["timestamps"].data) if "timestamps" in item and place.is_embed is None else 0
        for place, item in held
    ]
    return [place.get_num_embeds() - some for (place, _), some in zip(held, text, strict=True)]


@pytest.mark.parametrize("name", list(METHODS["llava"]))
def test_prompts_hold_what_attach_lets_in(
    laid_out: Processor, family: str, name: str, wanted: dict[str, list[Any]]
) -> None:
    found = {case: rows(laid_out(METHODS[family][name], case)) for case in prompts(family)}
    assert found == {case: wanted[f"{name}/{case}"][0] for case in prompts(family)}


@pytest.mark.parametrize("budget", [1, 7, 10**6, 0.1, 0.5, 1.0])
def test_a_budget_is_taken_of_what_stock_vllm_lays_out(laid_out: Processor, family: str, budget: int | float) -> None:
    """Each picture or clip enters with its budget, or whole where it has no more rows than that; marks and text stay.
    Tiles have budgets of their own."""
    for case in prompts(family):
        stock, ours = laid_out(None, case), laid_out({"method": "divprune", "budget": budget}, case)
        spans = TILES[case] if family == "internvl" else [1] * len(visual(stock))
        each = [count // some for count, some in zip(visual(stock), spans, strict=True)]
        most = [min(count, budget) if isinstance(budget, int) else max(1, int(budget * count)) for count in each]
        assert visual(ours) == [count * some for count, some in zip(most, spans, strict=True)]
        assert rows(stock) - rows(ours) == sum(visual(stock)) - sum(visual(ours))


@pytest.mark.parametrize("case", ["three", "picture between clips"])
def test_requests_have_budgets_of_their_own_and_caches_tell_them_apart(
    laid_out: Processor, family: str, case: str
) -> None:
    if case not in prompts(family):
        pytest.skip("takes no clips")
    settings: dict[str, Any] = {"method": "duet_plus", "budget": 12}
    usual = laid_out(settings, case, cached=True)
    assert visual(laid_out(settings, case, cached=True, duet_budget=5)) == [count * 5 // 12 for count in visual(usual)]
    again = laid_out(settings, case, cached=True)  # from the cache, where the pictures stand with either budget
    assert again["prompt_token_ids"] == usual["prompt_token_ids"] and again["mm_hashes"] == usual["mm_hashes"]
    others = [
        laid_out(settings, case, duet_budget=5),
        laid_out(settings | {"budget": 13}, case),
        laid_out(settings | {"method": "visionzip"}, case),
    ]
    hashes = [tuple(one for some in each["mm_hashes"].values() for one in some) for each in (usual, *others)]
    # nothing looks like itself under other settings
    assert len(set(hashes)) == 4 and len({one for some in hashes for one in some}) == 12


@pytest.mark.parametrize("case", ["two", "picture between clips"])
def test_the_worker_is_told_each_budget(laid_out: Processor, family: str, case: str) -> None:
    if case not in prompts(family):
        pytest.skip("takes no clips")
    told = ("image", "duet_budget"), ("video", "duet_budget_video")
    for asked, wanted in (({"duet_budget": 5}, 6.0), ({}, -1.0)):  # whole numbers stand one higher: 1.0 is all of them
        held = laid_out({"method": "duet_plus", "budget": 12}, case, **asked)["mm_kwargs"]
        found = [[float(item[name].data) for item in held.get(kind, [])] for kind, name in told]
        assert found == [[wanted] * len(media) for media in prompts(family)[case][1:]]


def test_clips_that_a_family_cannot_reduce_are_refused_with_the_reason(
    laid_out: Processor, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family in CLIPS:
        pytest.skip("takes clips")
    asked = {**prompts(family), "clip": ("hi", [], [film(0, 4, 56, 56)])}
    monkeypatch.setitem(globals(), "prompts", lambda family: asked)
    says = f"clips cannot be reduced for this model: {REFUSES[family]}" if family in REFUSES else "At most 0 video"
    # of a model that knows no clips the error is vLLM's own
    with pytest.raises((ValueError, VLLMValidationError), match=says):
        laid_out({"method": "duet_plus", "budget": 12}, "clip")


@pytest.mark.parametrize(("asked", "says"), REFUSED)
def test_what_a_request_cannot_have_is_said_before_anything_is_encoded(
    laid_out: Processor, asked: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        laid_out({"method": "duet_plus", "budget": 12}, "one", duet_budget=asked)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "fastv", "budget": 9}, "fastv: it drops inside the decoder"),
        ({"method": "duett", "budget": 9}, "did you mean 'duet'"),
        ({"method": "duet_plus"}, "needs a budget"),
        ({"method": "divprune", "keep": 0}, "leave none of an image's"),
    ],
)
def test_settings_that_no_server_can_run(laid_out: Processor, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        laid_out(settings, "one")


def test_positions_are_those_of_the_family(laid_out: Processor, family: str) -> None:
    other = {"compact": "keep", "keep": "compact"}[POSITIONS[family]]
    with pytest.raises(ValueError, match=f"positions='{other}'"):
        laid_out({"method": "divprune", "budget": 9, "options": {"positions": other}}, "one")


def test_the_plug_in_can_be_loaded_twice_and_imports_no_model() -> None:
    code = "import duet_vlm_vllm as p, sys; p.register(); p.register(); from vllm import ModelRegistry; "
    code += "print(all('Duet' + a in ModelRegistry.get_supported_archs() for a in p.MODULES), "
    code += (
        "[m for m in sys.modules if m.startswith('duet_vlm_vllm.')], 'vllm.model_executor.models.llava' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True [] False"
