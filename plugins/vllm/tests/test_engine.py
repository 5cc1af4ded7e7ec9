"""One engine for each family: answers equal those of ``attach`` without drops inside the decoder, whatever vLLM
batches, caches or cuts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engine
import pytest
from cases import BESIDE, METHODS, REFUSED, STAMP, prompts

NAMES = list(METHODS["llava"])


def differing(
    outputs: list[Any], family: str, name: str, wanted: dict[str, list[Any]], cases: Sequence[str] = ()
) -> list[Any]:
    """Answers to all prompts, or to these ``cases``, that differ from what is wanted."""
    pairs = [
        (case, engine.found(output), wanted[f"{name}/{case}"])
        for case, output in zip(cases or prompts(family), outputs, strict=True)
    ]
    return [(case, ours, theirs) for case, ours, theirs in pairs if not engine.same(ours, theirs)]


def ask(llm: Any, requests: list[Any]) -> list[Any]:
    return list(llm.generate(requests, engine.GREEDY, use_tqdm=False))


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_attach(llm: Any, family: str, name: str, wanted: dict[str, list[Any]]) -> None:
    """One after the other, all at once with prefixes from the cache, and all at once without."""
    engine.switch(llm, METHODS[family][name])
    requests = [engine.request(*prompt) for prompt in prompts(family).values()]
    assert not differing([ask(llm, [one])[0] for one in requests], family, name, wanted)
    together = ask(llm, requests)
    assert not differing(together, family, name, wanted) and sum(one.num_cached_tokens or 0 for one in together) >= 100
    llm.reset_prefix_cache()
    assert not differing(ask(llm, requests), family, name, wanted)


@pytest.mark.parametrize("case", ["one", "clip"])
def test_a_budget_is_what_enters_and_requests_may_ask_for_less(llm: Any, family: str, case: str) -> None:
    if case not in prompts(family):
        pytest.skip("takes no clips")
    engine.switch(llm, {"method": "duet_plus", "budget": 12})
    shown = prompts(family)[case]
    none = len(ask(llm, [engine.request(*prompts(family)["no picture"])])[0].prompt_token_ids)
    full = 12 + none + BESIDE[family] + (3 * STAMP if (family, case) == ("qwen3_vl", "clip") else 0)
    requests = [engine.request(*shown), *(engine.request(*shown, duet_budget=asked) for asked in (1, 5, 12))]
    assert [len(one.prompt_token_ids) - full for one in ask(llm, requests)] == [0, -11, -7, 0]


@pytest.mark.parametrize(("asked", "says"), REFUSED)
def test_what_a_request_cannot_have_is_an_error_and_the_engine_goes_on(
    llm: Any, family: str, asked: Any, says: str
) -> None:
    engine.switch(llm, {"method": "duet_plus", "budget": 12})
    for case in {"one", "clip"} & set(prompts(family)):
        with pytest.raises(ValueError, match=says):
            ask(llm, [engine.request(*prompts(family)[case], duet_budget=asked)])
        assert len(ask(llm, [engine.request(*prompts(family)[case])])) == 1


@pytest.mark.parametrize(("case", "pieces"), [("three", 3), ("clip", 3)])
def test_the_tower_takes_no_more_at_once_than_without_reduction(
    llm: Any, family: str, case: str, pieces: int, wanted: dict[str, list[Any]]
) -> None:
    """Three pictures in one prompt go through the tower one by one where it may see no more than one, as steps of a
    clip do; the answers stay."""
    if case not in prompts(family):
        pytest.skip("takes no clips")
    if case == "clip" and family == "llava_onevision":
        pieces = 8  # frames
    engine.switch(llm, METHODS[family]["duet"])
    model, calls = engine.model_of(llm), []
    tower = model.visual if hasattr(model, "visual") else model.vision_tower
    hook = tower.register_forward_pre_hook(lambda module, args, kwargs: calls.append(1), with_kwargs=True)
    try:
        for most, times in ((10**6, 1), (1, pieces)):
            calls.clear()
            model.most = most
            llm.reset_prefix_cache()
            llm.reset_mm_cache()
            llm.llm_engine.engine_core.engine_core.reset_encoder_cache()
            assert not differing(ask(llm, [engine.request(*prompts(family)[case])]), family, "duet", wanted, [case])
            assert len(calls) == times
    finally:
        hook.remove()


def test_prompts_that_are_cut_into_chunks(
    family: str, checkpoints: dict[str, Path], wanted: dict[str, list[Any]]
) -> None:
    llm = engine.start(checkpoints[family], family, METHODS[family]["duet"], max_num_batched_tokens=32)
    try:
        assert not differing(
            ask(llm, [engine.request(*prompt) for prompt in prompts(family).values()]), family, "duet", wanted
        )
    finally:
        llm.llm_engine.engine_core.shutdown()
