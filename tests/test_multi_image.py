"""Several images in one prompt: what each of them keeps when their tokens are ranked together, and when each is ranked
by itself."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, MIXED, ONE, THREE, TWO, clips_for, forward, generate, shared
from method_matrix import REDUCING, pairs
from reference_forward import choices_of, step_logits, walk_batch
from test_invariants import CLOSE, alive

import duet_vlm
from duet_vlm.reducers.decoder import DecoderReducer
from duet_vlm.utils.field_types import merged

DROPPING = [name for name in REDUCING if isinstance(duet_vlm.make_method(name), DecoderReducer)]
SEVERAL = (THREE, ONE, TWO)


def kept_and_planned(handle: duet_vlm.Handle) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    """Per sample, span and layer: tokens alive, and those of the plan."""
    kept = [[[len(tokens) for tokens in layers] for layers in alive(row)] for row in handle.trace]
    assert handle._prompt_state is not None
    return kept, [[list(plan.counts) for plan in row] for row in handle._prompt_state.plans]


@pytest.mark.parametrize("share", ["joint", "per_image"])
@pairs(DROPPING, parts=1)
def test_what_an_image_keeps(family: str, method: str, share: str) -> None:
    """Ranked by itself exactly what is planned for it; together, the sum of all plans."""
    batches = [SEVERAL, *([clips_for(family)] if FAMILIES[family].video else [])]
    for rows in batches:
        with duet_vlm.attach(
            shared(family), method, **merged(REDUCING[method], {"options": {"multi_image": share}})
        ) as handle:
            forward(shared(family), FAMILIES[family].inputs(rows))
            kept, planned = kept_and_planned(handle)
            report = handle.report()
            assert report.nominal == report.measured
            means = [tuple(sum(layers) / len(layers) for layers in row) for row in kept]
            assert [pytest.approx(row) for row in report.images] == means
            assert ("mean visual tokens by image" in str(report)) == any(len(row) > 1 for row in means)
        if share == "per_image":
            assert kept == planned
        else:
            assert [[sum(layer) for layer in zip(*row, strict=True)] for row in kept] == [
                [sum(layer) for layer in zip(*row, strict=True)] for row in planned
            ]


def test_together_an_image_may_keep_more_than_its_share() -> None:
    """Otherwise the setting would change nothing."""
    for family in ("llava", "qwen2_5_vl"):
        with duet_vlm.attach(shared(family), "duet", **REDUCING["duet"]) as handle:
            forward(shared(family), FAMILIES[family].inputs(SEVERAL))
            kept, planned = kept_and_planned(handle)
        assert kept != planned


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("method", ["duet", "duet_plus", "fastv", "pyramiddrop"])
def test_by_itself_an_image_keeps_its_best_tokens(family: str, method: str) -> None:
    """By the attention maps of the eager oracle, span by span."""
    inputs = FAMILIES[family].inputs(SEVERAL)
    with duet_vlm.attach(
        shared(family), method, **merged(REDUCING[method], {"options": {"multi_image": "per_image"}})
    ) as handle:
        forward(shared(family), inputs)
        choices = choices_of(handle)
    drops = [layer for layer in choices[0].alive if layer > 0]
    watch = [FAMILIES[family].ranking(layer - (method == "fastv")) for layer in drops]
    compared = 0
    for choice, walk in zip(choices, walk_batch(shared(family, "eager"), inputs, choices, watch=watch), strict=True):
        last = max(slot for places in choice.places for slot in places)
        queries = list(range(last + 1, choice.slots)) if method.startswith("duet") else [choice.slots - 1]
        for drop, layer in zip(drops, watch, strict=True):
            score = walk.attention[layer][queries].mean(0)
            for places, rows in zip(choice.places, choice.rows, strict=True):
                span = {places[token] for token in rows}
                before, after = choice.visible(drop - 1) & span, choice.visible(drop) & span
                if after and before - after:
                    assert float(score[sorted(after)].min()) >= float(score[sorted(before - after)].max()) - 1e-5
                    compared += 1
    assert compared >= 6


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", DROPPING)
def test_one_image_is_ranked_the_same_way(family: str, method: str) -> None:
    inputs, logits = FAMILIES[family].inputs([ONE, (1, 31, 32)]), []
    for share in ("joint", "per_image"):
        with duet_vlm.attach(shared(family), method, **merged(REDUCING[method], {"options": {"multi_image": share}})):
            logits.append(forward(shared(family), inputs).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_decoding_equals_the_oracle(family: str, use_cache: bool) -> None:
    inputs, model = FAMILIES[family].inputs(MIXED), shared(family)
    with duet_vlm.attach(
        model, "duet", **merged(REDUCING["duet"], {"options": {"multi_image": "per_image"}})
    ) as handle:
        written = generate(model, inputs, 5, use_cache=use_cache)
        forward(model, inputs)  # generate() without a cache ends with a longer prompt
        kept, planned = kept_and_planned(handle)
        choices = choices_of(handle)
    assert kept == planned
    generated = written.sequences[:, inputs["input_ids"].shape[1] :]
    walks = walk_batch(shared(family, "eager"), inputs, choices, generated)
    for found, expected in zip(written.logits, step_logits(walks, choices, generated.shape[1]), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_beams_of_a_prompt_keep_the_same(family: str) -> None:
    with duet_vlm.attach(
        shared(family), "duet", **merged(REDUCING["duet"], {"options": {"multi_image": "per_image"}})
    ) as handle:
        generate(shared(family), FAMILIES[family].inputs(MIXED), 4, num_beams=3)
        kept, planned = kept_and_planned(handle)
    assert kept == planned and len(kept) == 3 * len(MIXED)
