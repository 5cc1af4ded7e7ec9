"""What must hold for every method on every family: one matrix."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXED, ONE, TEXT, THREE, TWO, Inputs, Row, forward, generate, shared, untouched
from method_matrix import BY_TEXT, KEEP_ALL, OFFICIAL, REDUCING, TOO_EARLY, Case, matrix, pairs
from reference_forward import Choice, choices_of, step_logits, walk_batch, walks_of
from torch import Tensor

import duet_vlm

CLOSE = {"rtol": 1e-3, "atol": 5e-4}  # logits are of size 1 to 5; reductions move them by more than 0.1
VISIBLE = 0.04  # a reduction that moves no logit by this much would make a comparison empty
RAGGED: tuple[Row, ...] = (ONE, THREE, TEXT, TWO)


def effect(a: Any, b: Any) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


# ---- keeping everything changes nothing


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pairs(KEEP_ALL)
def test_keeping_every_token_is_bit_equal(family: str, attention: str, method: tuple[str, dict[str, Any]]) -> None:
    (name, settings), model = method, shared(family, attention)
    for rows, side, writes in (((TWO,), "left", True), (MIXED, "right", False), (MIXED, "left", True)):
        plain, inputs = untouched(family, attention, rows, side), FAMILIES[family].inputs(rows, side)
        with duet_vlm.attach(model, name, **settings):
            assert torch.equal(plain.logits, forward(model, inputs).logits)
            if writes:
                written = generate(model, inputs)
                assert torch.equal(plain.sequences, written.sequences)
                assert all(torch.equal(a, b) for a, b in zip(plain.steps, written.logits, strict=True))


@matrix(parts=1)
def test_text_only_prompts_are_bit_equal(case: Case) -> None:
    plain = untouched(case.family, case.attention, (TEXT,))
    with case.attach():
        written = generate(case.model(), FAMILIES[case.family].inputs([TEXT]))
    assert all(torch.equal(a, b) for a, b in zip(plain.steps, written.logits, strict=True))


@matrix(parts=1)
def test_paused_is_bit_equal_and_resumes(case: Case) -> None:
    inputs, plain = FAMILIES[case.family].inputs(MIXED), untouched(case.family, case.attention, MIXED).logits
    with case.attach() as handle:
        reduced = forward(case.model(), inputs).logits
        with handle.paused():
            assert torch.equal(forward(case.model(), inputs).logits, plain)
        assert torch.equal(forward(case.model(), inputs).logits, reduced)


# ---- a row of a padded batch equals that row alone


def alive(trace: list[Any]) -> list[list[tuple[int, ...]]]:
    """Per span the tokens alive at the input of each layer."""
    depth = 8
    return [
        [next(s.kept for s in reversed(span.stages) if s.layer <= layer) for layer in range(depth)] for span in trace
    ]


def surviving_logits(logits: Tensor, slots: Tensor, sample: int) -> tuple[list[int], Tensor]:
    """Slots (counted from the sample's first real token) and logits of the rows that are left."""
    real = slots[sample] >= 0
    return slots[sample][real].tolist(), logits[sample][real]


@matrix(parts=2)
def test_padded_row_equals_row_alone(case: Case) -> None:
    family, model = FAMILIES[case.family], case.model()
    with case.attach() as handle:
        alone = [
            (
                forward(model, family.inputs([row])).logits,
                *((None, None) if row is TEXT else (handle.slots, handle.trace)),
            )
            for row in RAGGED
        ]
        for side in ("left", "right"):
            batch = family.inputs(RAGGED, side)
            together = forward(model, batch).logits
            for sample, (expected, slots, trace) in enumerate(alone):
                pad = int((batch["attention_mask"][sample] == 0).sum()) if side == "left" else 0
                places, logits = surviving_logits(together, handle.slots, sample)
                if slots is None:
                    assert [p - pad for p in places] == list(range(expected.shape[1]))
                    torch.testing.assert_close(logits, expected[0], **CLOSE)
                    continue
                assert alive(handle.trace[sample]) == alive(trace[0])
                assert [span.merged for span in handle.trace[sample]] == [span.merged for span in trace[0]]
                alone_places, alone_logits = surviving_logits(expected, slots, 0)
                assert [p - pad for p in places] == alone_places
                torch.testing.assert_close(logits, alone_logits, **CLOSE)


@matrix(attention=("sdpa",), parts=1)
def test_order_of_the_batch_does_not_matter(case: Case) -> None:
    family, model = FAMILIES[case.family], case.model()
    order = [3, 1, 0, 2]
    with case.attach() as handle:
        forward(model, family.inputs(RAGGED))
        first = [alive(row) for row in handle.trace]
        forward(model, family.inputs([RAGGED[i] for i in order]))
        assert [alive(row) for row in handle.trace] == [first[i] for i in order]


# ---- decoding equals the masked oracle


def oracle_steps(case: Case, inputs: Inputs, choices: list[Choice], generated: Tensor) -> list[Tensor]:
    walks = walk_batch(shared(case.family, "eager"), inputs, choices, generated)
    return step_logits(walks, choices, generated.shape[1])


def beams_equal_oracle(case: Case, rows: tuple[Row, ...], new: int) -> None:
    """Three beams, two of them returned, with and without a cache."""
    inputs, model, beams = FAMILIES[case.family].inputs(rows), case.model(), 3
    with case.attach() as handle:
        options = {"num_beams": beams, "num_return_sequences": 2, "output_scores": True}
        cached = generate(model, inputs, new, **options)
        choices = choices_of(handle)
        uncached = generate(model, inputs, new, use_cache=False, **options)
    generated = cached.sequences[:, inputs["input_ids"].shape[1] :]
    returned = [choices[i // 2 * beams] for i in range(len(generated))]
    for step, expected in enumerate(oracle_steps(case, inputs, returned, generated)):
        torch.testing.assert_close(cached.logits[step][cached.beam_indices[:, step]], expected, **CLOSE)
    assert torch.equal(uncached.sequences, cached.sequences)
    torch.testing.assert_close(uncached.sequences_scores, cached.sequences_scores, **CLOSE)


@matrix(parts=1, rows={"two": (TWO,), "ragged": RAGGED})
def test_greedy_equals_oracle(case: Case, rows: tuple[Row, ...]) -> None:
    inputs, model = FAMILIES[case.family].inputs(rows), case.model()
    plain = untouched(case.family, case.attention, rows)
    with case.attach() as handle:
        cached = generate(model, inputs)
        choices = choices_of(handle)
        uncached = generate(model, inputs, use_cache=False)
    generated = cached.sequences[:, inputs["input_ids"].shape[1] :]
    assert effect(plain.steps, cached.logits) > VISIBLE
    for step, expected in enumerate(oracle_steps(case, inputs, choices, generated)):
        torch.testing.assert_close(cached.logits[step], expected, **CLOSE)
        torch.testing.assert_close(uncached.logits[step], expected, **CLOSE)
    assert torch.equal(uncached.sequences, cached.sequences)


@matrix(parts=2, use_cache={"cache": True, "no cache": False}, side=("left", "right"))
def test_forward_equals_oracle(case: Case, use_cache: bool, side: str) -> None:
    """Every surviving row, not only the last; without a cache the kept positions have gaps (packed-sequence trap)."""
    model = case.model()
    for rows in ((TWO,), RAGGED) if side == "left" else (RAGGED,):  # a row by itself is not padded
        inputs = FAMILIES[case.family].inputs(rows, side)
        with case.attach() as handle:
            logits = forward(model, inputs, use_cache=use_cache).logits
            choices, slots = choices_of(handle), handle.slots
        for sample, walk in enumerate(walks_of(case.family, rows, choices)):
            pad = int((inputs["attention_mask"][sample] == 0).sum()) if side == "left" else 0
            places, rows_left = surviving_logits(logits, slots, sample)
            assert len(places) == len(choices[sample].visible(7))
            torch.testing.assert_close(rows_left, walk.logits[[p - pad for p in places]], **CLOSE)


@pairs(OFFICIAL, ["llava", "llava_gqa"])
def test_official_presets_equal_oracle(family: str, method: str) -> None:
    inputs, model = FAMILIES[family].inputs(RAGGED), shared(family)
    with duet_vlm.attach(model, OFFICIAL[method]) as handle:
        written = generate(model, inputs, 5)
        choices = choices_of(handle)
    generated = written.sequences[:, inputs["input_ids"].shape[1] :]
    for step, expected in enumerate(oracle_steps(Case(family, "sdpa", method, "compact"), inputs, choices, generated)):
        torch.testing.assert_close(written.logits[step], expected, **CLOSE)


@matrix(attention=("sdpa",), parts=1)
def test_beam_search_equals_oracle(case: Case) -> None:
    beams_equal_oracle(case, RAGGED, 3)


@matrix(attention=("sdpa",), parts=1)
def test_sampling_equals_oracle(case: Case) -> None:
    inputs, model = FAMILIES[case.family].inputs(RAGGED), case.model()
    with case.attach() as handle:
        torch.manual_seed(7)
        written = generate(model, inputs, 5, do_sample=True, temperature=2.0, top_k=0, num_return_sequences=2)
        choices = choices_of(handle)
        torch.manual_seed(7)
        again = generate(model, inputs, 5, do_sample=True, temperature=2.0, top_k=0, num_return_sequences=2)
    generated = written.sequences[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(written.sequences, again.sequences)
    assert len(choices) == 2 * len(RAGGED)
    for step, expected in enumerate(oracle_steps(case, inputs, choices, generated)):
        torch.testing.assert_close(written.logits[step], expected, **CLOSE)


# ---- who survives


@matrix(*BY_TEXT)
def test_survivors_are_those_with_the_largest_scores(case: Case) -> None:
    """T2V ranks by the attention maps of the eager oracle: rows after the last visual token ask (FastV and PyramidDrop:
    the last row)."""
    inputs, model = FAMILIES[case.family].inputs(RAGGED), case.model()
    with case.attach() as handle:
        forward(model, inputs)
        choices, reducer = choices_of(handle), handle.reducer
    drops = [layer for layer in choices[0].alive if layer > 0]
    # FastV: by the attention of the layer before the drop
    watch = [FAMILIES[case.family].ranking(layer - reducer.score_layer_offset) for layer in drops]
    walks = walk_batch(shared(case.family, "eager"), inputs, choices, watch=watch)
    ranked = 0
    for choice, walk in zip(choices, walks, strict=True):
        if not choice.places:
            continue
        first_query = max(slot for places in choice.places for slot in places) + 1
        spans = {places[token] for places, rows in zip(choice.places, choice.rows, strict=True) for token in rows}
        queries = range(first_query, choice.slots) if reducer.options.text_query == "all" else [choice.slots - 1]
        for drop, layer in zip(drops, watch, strict=True):
            score = walk.attention[layer][list(queries)].mean(0)
            before, after = choice.visible(drop - 1) & spans, choice.visible(drop) & spans
            gone = before - after
            if after and gone:
                assert float(score[sorted(after)].min()) >= float(score[sorted(gone)].max()) - 1e-5
                ranked += 1
    assert ranked >= 3


@matrix(attention=("eager",), parts=1)
def test_all_attention_implementations_keep_the_same_tokens(case: Case) -> None:
    inputs = FAMILIES[case.family].inputs(RAGGED)
    traces = []
    for attention in ("eager", "sdpa"):
        model = shared(case.family, attention)
        with case.attach(model) as handle:
            forward(model, inputs)
            traces.append(handle.trace)
    assert traces[0] == traces[1]


@matrix(parts=1)
def test_deterministic(case: Case) -> None:
    inputs = FAMILIES[case.family].inputs(RAGGED)
    with case.attach() as handle:
        first = forward(case.model(), inputs).logits
        trace = handle.trace
        assert torch.equal(forward(case.model(), inputs).logits, first)
        assert handle.trace == trace


@matrix(parts=2)
def test_token_map_accounts_for_every_visual_token(case: Case) -> None:
    family = FAMILIES[case.family]
    inputs = family.inputs(RAGGED)
    with case.attach() as handle:
        forward(case.model(), inputs)
        traces, plan = handle.trace, handle.plan
        weighs = any(
            encoded.selection is not None and encoded.selection.weights is not None
            for encoded, _ in handle._prompt_state.sources
        )
    assert [len(row) for row in traces] == [1, 3, 0, 2]
    for span in (span for row in traces for span in row):
        everything = set(range(span.span.tokens))
        members = [m for joined in span.merged.values() for m in joined]
        kept, dropped = set(span.stages[0].kept), set(span.stages[0].dropped)
        assert weighs or (len(members) == len(set(members)) and not kept & set(members))  # merged into exactly one
        assert set(span.merged) <= kept | dropped and not kept & dropped and not dropped & set(members)
        assert kept | set(members) | dropped == everything
        for before, after in zip(span.stages, span.stages[1:], strict=False):
            gone = [m for joined in after.merged.values() for m in joined]
            there = sorted([*before.kept, *before.asleep])
            assert sorted([*after.kept, *after.dropped, *gone, *after.asleep]) == there
            assert set(after.merged) <= set(after.kept)
        assert len(span.stages[0].kept) in (plan(span.span.tokens).entry, plan(span.span.tokens).counts[0])
    for row in traces:
        for layer in range(8):
            assert sum(len(kept[layer]) for kept in alive(row)) == sum(plan(s.span.tokens).counts[layer] for s in row)


# ---- how much is left


@matrix(parts=2)
def test_cache_and_report_match_the_schedule(case: Case) -> None:
    family, model = FAMILIES[case.family], case.model()
    inputs = family.inputs(RAGGED)
    with case.attach() as handle:
        cache = forward(model, inputs, use_cache=True).past_key_values
        report = handle.report()
        plans = [[handle.plan(family.tokens(item)) for item in row if not isinstance(item, int)] for row in RAGGED]
        text = [
            len(family.expand(row)) - sum(plan.tokens for plan in ps) for row, ps in zip(RAGGED, plans, strict=True)
        ]
    lengths = [
        max(n + sum(p.counts[layer] for p in ps) for n, ps in zip(text, plans, strict=True)) for layer in range(8)
    ]
    # linear layers have a state instead
    kept = [layer for layer, entry in enumerate(cache.layers) if hasattr(entry, "keys")]
    assert [cache.get_seq_length(layer) for layer in kept] == [lengths[layer] for layer in kept]
    assert (
        report.observed.kv_bytes
        == report.predicted.kv_bytes
        == sum(cache.layers[i].keys.nbytes + cache.layers[i].values.nbytes for i in kept)
    )
    assert report.nominal == report.measured
    assert report.measured == tuple(
        sum(p.counts[layer] for ps in plans for p in ps) / len(RAGGED) for layer in range(8)
    )
    assert report.predicted == report.observed
    assert report.observed.decoder_flops < report.full.decoder_flops


BUDGETS = dict.fromkeys(REDUCING, 0.3)


@pairs(BUDGETS, parts=1)
def test_measured_mean_is_the_solved_budget(family: str, method: str) -> None:
    made, model = FAMILIES[family], shared(family)
    inputs = made.inputs([ONE])
    tokens = made.tokens(ONE[2])  # type: ignore[arg-type]
    if family in TOO_EARLY.get(method, ()):
        with (
            pytest.raises(ValueError, match="no attention to rank tokens by"),
            duet_vlm.attach(model, method, budget=0.3),
        ):
            forward(model, inputs)
        return
    for budget in (BUDGETS[method], math.ceil(BUDGETS[method] * tokens)):
        target = budget * tokens if isinstance(budget, float) else budget
        with duet_vlm.attach(model, method, budget=budget) as handle:
            forward(model, inputs)
            report = handle.report()
            assert report.measured_mean == report.nominal_mean == handle.plan(tokens).mean
            assert target - 1 < report.measured_mean <= target + 1e-9


@matrix("duet", "fastv", "visionzip", attention=("sdpa",))
def test_decode_steps_add_one_row_to_every_layer(case: Case) -> None:
    model = case.model()
    inputs = FAMILIES[case.family].inputs(RAGGED)
    with case.attach() as handle:
        entries = forward(model, inputs, use_cache=True).past_key_values.layers
        # what sliding layers forgot included
        widths = [entry.get_seq_length() for entry in entries if hasattr(entry, "keys")]
        written = generate(model, inputs, 6)
        for cache, width in zip([c for c in written.past_key_values.layers if hasattr(c, "keys")], widths, strict=True):
            most = cache.sliding_window - 1 if cache.is_sliding else width + 5  # sliding layers keep a window
            assert cache.keys.shape[2] == min(width + 5, most)
        assert handle.report().decoded == 5
    assert len(set(widths)) > 1 or case.method == "visionzip"


# ---- ties, and numbers that are none


@pytest.mark.parametrize("family", FAMILIES)
def test_ties_go_to_the_lower_index(family: str) -> None:
    """With zero queries every key gets the same attention, so every visual token the same score."""
    case = Case(family, "sdpa", "duet", "keep")
    model = case.fresh()
    with torch.no_grad():
        for name, weight in FAMILIES[family].text(model).named_parameters():
            if "q_proj" in name:
                weight.zero_()
    with duet_vlm.attach(model, "duet", schedule=((3, 5),)) as handle:
        forward(model, FAMILIES[family].inputs([ONE]))
        assert alive(handle.trace[0])[0][3] == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(family: str, bad: float) -> None:
    model = shared(family)
    for method in REDUCING:
        inputs = FAMILIES[family].inputs([ONE])
        inputs["pixel_values"][0] = bad
        with duet_vlm.attach(model, method, **REDUCING[method]), pytest.raises(ValueError, match="NaN or Inf"):
            forward(model, inputs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(family: str, bad: float) -> None:
    model = Case(family, "sdpa", "fastv", "keep").fresh()
    with torch.no_grad():
        FAMILIES[family].text(model).layers[FAMILIES[family].ranking(2)].self_attn.k_proj.weight[0, 0] = bad
    message = f"attention scores at decoder layer {FAMILIES[family].ranking(2)} contain NaN"
    with duet_vlm.attach(model, "duet", schedule=((2, 0.5),)), pytest.raises(ValueError, match=message):
        forward(model, FAMILIES[family].inputs([ONE]))
