"""Tokens that leave may come back: a loop over layers on the full sequence, written by hand, decides what is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import DEPTH, FAMILIES, MIXED, ONE, TEXT, THREE, TWO, Row, build, forward, generate, shared, untouched
from method_matrix import REDUCING
from reference_forward import choices_of, step_logits, walk_batch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import duet_vlm
from duet_vlm import DecoderReducer, TokenOptions
from duet_vlm.models.adapter import LINEAR
from duet_vlm.planning.tokens import SpanTrace
from duet_vlm.profiling.flop_counter import count_flops
from duet_vlm.viz.depth import token_fates

CLOSE = {"rtol": 1e-3, "atol": 5e-4}
RAGGED: tuple[Row, ...] = (ONE, THREE, TEXT, TWO)
STAGE = TokenOptions(reentry="stage")
PYRAMID: dict[str, Any] = {"schedule": ((2, 0.4), (4, 0.4), (6, 0.2)), "options": STAGE}
LINEAR_FAMILIES = ("qwen3_5", "qwen3_5_moe")
AWAKE = [name for name in FAMILIES if name not in LINEAR_FAMILIES]
SEVERAL: dict[str, dict[str, Any]] = {  # methods of all kinds, each with several stages
    "dart": {"schedule": ((3, 0.5), (4, 0.3), (6, 0.2)), "visual_pivots": 2, "text_pivots": 2},
    "duet": {"dominant": 0.5, "contextual": 0.2, "schedule": ((3, 0.5), (4, 0.5), (5, 0.25), (7, 0.0))},
    "fitprune": REDUCING["fitprune"],
    "frames+visionzip+pyramiddrop": REDUCING["frames+visionzip+pyramiddrop"],
    "metok": REDUCING["metok"],
    "pyramiddrop": {"budget": 0.4},
    "sieve": REDUCING["sieve"],
    "stateful": REDUCING["stateful"],
}


def settings_of(name: str) -> dict[str, Any]:
    settings = dict(SEVERAL[name])
    return settings | {"options": {**settings.get("options", {}), "reentry": "stage"}}


def came_back(trace: list[list[SpanTrace]]) -> int:
    """Tokens that a stage keeps and the one before did not."""
    return sum(
        len(set(later.kept) - set(earlier.kept))
        for row in trace
        for span in row
        for earlier, later in zip(span.stages, span.stages[1:], strict=False)
    )


# ---- against the loop by hand


def equals_loop(family: str, rows: tuple[Row, ...], method: str, **settings: Any) -> int:
    """Answers with and without a cache, and the rows in every cache; the number of tokens that came back."""
    inputs, model = FAMILIES[family].inputs(rows), shared(family)
    with duet_vlm.attach(model, method, **settings) as handle:
        written = generate(model, inputs, 4)
        choices, woken = choices_of(handle), came_back(handle.trace)
        uncached = generate(model, inputs, 4, use_cache=False)
    generated = written.sequences[:, inputs["input_ids"].shape[1] :]
    walks = walk_batch(shared(family, "eager"), inputs, choices, generated)
    for step, expected in enumerate(step_logits(walks, choices, generated.shape[1])):
        torch.testing.assert_close(written.logits[step], expected, **CLOSE)
        torch.testing.assert_close(uncached.logits[step], expected, **CLOSE)
    held = max(len(choice.alive[0]) for choice in choices)
    assert written.past_key_values.get_seq_length() <= held + 3
    return woken


@pytest.mark.parametrize("family", AWAKE)
def test_every_family_equals_the_loop(family: str) -> None:
    assert equals_loop(family, RAGGED, "pyramiddrop", **PYRAMID)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", SEVERAL)
def test_every_kind_of_method_equals_the_loop(family: str, method: str) -> None:
    assert equals_loop(family, (ONE, THREE), method, **settings_of(method))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_images_that_are_ranked_apart_equal_the_loop(family: str) -> None:
    options = TokenOptions(reentry="stage", multi_image="per_image", text_query="all")
    assert equals_loop(family, RAGGED, "pyramiddrop", **PYRAMID | {"options": options})


@pytest.mark.parametrize("family", AWAKE)
def test_the_choice_is_by_attention_over_all_that_entered(family: str) -> None:
    inputs, model, layers = FAMILIES[family].inputs(RAGGED), shared(family), (2, 4, 6)
    with duet_vlm.attach(model, "pyramiddrop", **PYRAMID) as handle:
        forward(model, inputs)
        choices = choices_of(handle)
    walks = walk_batch(shared(family, "eager"), inputs, choices, watch=layers)
    for walk, choice in zip(walks, choices, strict=True):
        pool = sorted(place for places in choice.places for place in places)
        for layer in layers if pool else ():
            score = walk.attention[layer][choice.slots - 1]
            kept = [place for place in pool if place in choice.visible(layer)]
            left = [place for place in pool if place not in choice.visible(layer)]
            assert score[kept].min() >= score[left].max() - 1e-6


# ---- equal to the bit


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "qwen3_vl"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [("pyramiddrop", {"schedule": ((2, 1.0), (4, 1.0))}), ("duet", {"schedule": ((3, 1.0),)}), ("stateful", {"end": 1.0, "power": 1.0})],
)  # fmt: skip
def test_keeping_every_token_changes_nothing(family: str, method: str, settings: dict[str, Any]) -> None:
    plain, model, inputs = untouched(family, "sdpa", MIXED), shared(family), FAMILIES[family].inputs(MIXED)
    with duet_vlm.attach(model, method, **settings, options=STAGE):
        assert torch.equal(forward(model, inputs).logits, plain.logits)
        assert torch.equal(generate(model, inputs).sequences, plain.sequences)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "qwen3_vl"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [("pyramiddrop", {"schedule": ((3, 0.4),)}), ("fastv", REDUCING["fastv"]), ("duet", {"dominant": 0.6, "contextual": 0.2, "schedule": ((4, 0.3),)})],
)  # fmt: skip
def test_one_decision_is_a_deletion(family: str, method: str, settings: dict[str, Any]) -> None:
    inputs, model, found = FAMILIES[family].inputs(RAGGED), shared(family), []
    for reentry in ("none", "stage"):
        with duet_vlm.attach(model, method, **settings, options=TokenOptions(reentry=reentry)) as handle:
            written = generate(model, inputs, 4)
            found.append((written, handle.trace, handle.report().observed))
    (deleted, trace, cost), (slept, same_trace, same_cost) = found
    assert all(torch.equal(a, b) for a, b in zip(deleted.logits, slept.logits, strict=True))
    assert trace == same_trace and cost == same_cost


def test_a_model_is_as_it_was_after_detach() -> None:
    inputs, model, plain = FAMILIES["llava"].inputs(MIXED), shared("llava"), untouched("llava", "sdpa", MIXED)
    with duet_vlm.attach(model, "pyramiddrop", **PYRAMID) as handle:
        reduced = forward(model, inputs).logits
        with handle.paused():
            assert torch.equal(forward(model, inputs).logits, plain.logits)
        assert torch.equal(forward(model, inputs).logits, reduced)
    assert torch.equal(forward(model, inputs).logits, plain.logits)


# ---- rows of a batch, caches, costs


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "llava_next"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["pyramiddrop", "duet", "stateful"])
def test_a_row_of_a_batch_equals_the_row_alone(family: str, side: str, method: str) -> None:
    """Where plans of other rows have stages that its own plan does not have, too."""
    model, batch = shared(family), FAMILIES[family].inputs(RAGGED, side)
    with duet_vlm.attach(model, method, **settings_of(method)) as handle:
        logits, together = forward(model, batch).logits, handle.trace
        for number, row in enumerate(RAGGED):
            torch.testing.assert_close(
                logits[number, -1], forward(model, FAMILIES[family].inputs([row])).logits[0, -1], **CLOSE
            )
            if row != TEXT:
                assert kept(handle.trace[0]) == kept(together[number])


def kept(spans: list[SpanTrace]) -> list[list[tuple[int, ...]]]:
    """The tokens of each span in each layer."""
    return [
        [[stage.kept for stage in span.stages if stage.layer <= layer][-1] for layer in range(DEPTH)] for span in spans
    ]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_cache_holds_what_its_layer_read(family: str) -> None:
    inputs, model = FAMILIES[family].inputs([ONE]), shared(family)
    with duet_vlm.attach(model, "pyramiddrop", **PYRAMID) as handle:
        cache = generate(model, inputs, 4).past_key_values
        plan, report = handle.plan(handle.trace[0][0].span.tokens), handle.report()
    text = inputs["input_ids"].shape[1] - plan.tokens
    assert [layer.keys.shape[-2] for layer in cache.layers] == [text + count + 3 for count in plan.counts]
    assert report.nominal == report.measured == plan.counts
    assert report.observed.kv_bytes == report.predicted.kv_bytes


def test_pictures_show_a_token_that_came_back_as_alive() -> None:
    inputs, model = FAMILIES["llava"].inputs([ONE]), shared("llava")
    with duet_vlm.attach(model, "pyramiddrop", **PYRAMID) as handle:
        forward(model, inputs)
        (span,) = handle.trace[0]
    for layer in range(DEPTH):
        fates = token_fates(span, layer)
        assert fates.alive == set(kept([span])[0][layer])
        assert fates.dropped.keys() == set(range(span.span.tokens)) - fates.alive


def test_beams_follow_tokens_that_came_back() -> None:
    inputs, model = FAMILIES["llava"].inputs(RAGGED), shared("llava")
    with duet_vlm.attach(model, "pyramiddrop", **PYRAMID) as handle:
        written = generate(model, inputs, 4, num_beams=3, output_scores=True)
        choices = choices_of(handle)
    generated = written.sequences[:, inputs["input_ids"].shape[1] :]
    own = choices[:: len(choices) // len(generated)]
    walks = walk_batch(shared("llava", "eager"), inputs, own, generated)
    for step, expected in enumerate(step_logits(walks, own, generated.shape[1])):
        torch.testing.assert_close(written.logits[step][written.beam_indices[:, step]], expected, **CLOSE)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "qwen3_vl"])
@pytest.mark.parametrize("method", SEVERAL)
def test_costs_are_those_that_were_predicted(family: str, method: str) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs([THREE])
    with torch.no_grad(), duet_vlm.attach(model, method, **settings_of(method)) as handle:
        counted = count_flops(lambda: model(**inputs, logits_to_keep=1))
        report = handle.report()
    assert report.observed.flops == pytest.approx(counted, rel=0.01)
    assert report.predicted.flops == pytest.approx(counted, rel=0.01)


# ---- training


def gradients(options: TokenOptions, wrap: bool = False, checkpoint: bool = False) -> dict[str, Tensor]:
    model = build("llava", "sdpa").train()
    inputs = FAMILIES["llava"].inputs([ONE])
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if wrap:
        layers = model.model.language_model.layers
        for index, layer in enumerate(layers):
            layers[index] = checkpoint_wrapper(layer)
    with duet_vlm.attach(model, "pyramiddrop", **PYRAMID | {"options": options}):
        model(**inputs, labels=inputs["input_ids"].clone()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_go_through_the_rows_that_slept() -> None:
    inputs, found = FAMILIES["llava"].inputs([ONE]), []
    for attention in ("sdpa", "eager"):
        model = build("llava", attention).train()
        if attention == "sdpa":
            with duet_vlm.attach(model, "pyramiddrop", **PYRAMID) as handle:
                last, choices = model(**inputs).logits[0, -1], choices_of(handle)
                assert came_back(handle.trace)
        else:
            last = walk_batch(model, inputs, choices, differentiate=True)[0].logits[-1]
        last.log_softmax(-1)[7].backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[1].items():
        if "language_model.layers" in name:
            torch.testing.assert_close(found[0][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("how", ["checkpoint", "wrap"])
def test_layers_that_run_again_are_refused(how: str) -> None:
    with pytest.raises(ValueError, match=r"pyramiddrop: reentry='stage' keeps .* switch gradient checkpointing off"):
        gradients(STAGE, **{how: True})
    assert gradients(TokenOptions(), **{how: True})


# ---- what is refused


@pytest.mark.parametrize(
    ("family", "method", "settings", "says"),
    [
        ("llava", "pyramiddrop", {"options": TokenOptions(reentry="stage", positions="compact")}, "brings tokens back to .*; use 'keep'"),
        ("llava", "pyramiddrop", {"options": TokenOptions(reentry="stage", trim_kv_cache=True)}, "use trim_kv_cache=False"),
        ("llava", "sparsevlm", {"options": STAGE}, "wakes tokens as they fell asleep"),
        ("llava", "visionzip+tokencarve", {"options": TokenOptions(reentry="stage", trim_kv_cache=False)}, "wakes tokens"),
        ("llava", "v2drop", {"options": STAGE}, "has no previous_hidden_states of a token that slept"),
        ("llava", "pio", {"options": STAGE}, "has no gradient of a token that slept"),
        ("qwen3_5", "pyramiddrop", {"options": STAGE}, "skips layers for a token, and a layer of qwen3_5"),
        ("llava", "visionzip", {"options": STAGE}, "options.reentry='stage' concerns a stage that visionzip does not have"),
        ("llava", "pyramiddrop", {"options": {"reentry": "layer"}}, "reentry='layer'"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_refused_and_leaves_no_trace(
    family: str, method: str, settings: dict[str, Any], says: str
) -> None:
    model = shared(family)
    before = hooks_of(model)
    with pytest.raises(ValueError, match=says):
        duet_vlm.attach(model, method, budget=0.5, **settings)
    assert duet_vlm.handle_of(model) is None and hooks_of(model) == before


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) + ("forward" in vars(m)) for m in model.modules())


def test_settings_that_are_refused_leave_those_in_force() -> None:
    model = shared("llava")
    with duet_vlm.attach(model, "pyramiddrop", **PYRAMID) as handle:
        with pytest.raises(ValueError, match="use trim_kv_cache=False"):
            handle.set(options=TokenOptions(trim_kv_cache=True))
        assert handle.reducer.options == duet_vlm.get_method("pyramiddrop")(**PYRAMID).options


def test_families_with_a_state_are_those_that_are_left_out() -> None:
    for family in FAMILIES:
        with duet_vlm.attach(shared(family), "none") as handle:
            assert (LINEAR in handle.adapter.layer_types) == (family in LINEAR_FAMILIES)


@pytest.mark.parametrize("method", ["duet", "pyramiddrop"])
def test_a_server_does_not_have_it(method: str) -> None:
    from duet_vlm.serve.decoder_stages import check_decoder_method

    reducer = duet_vlm.get_method(method)(schedule=((2, 0.5),), options=STAGE)
    assert isinstance(reducer, DecoderReducer)
    with pytest.raises(ValueError, match="reentry='stage': what leaves between two layers is gone; set 'none'"):
        check_decoder_method(reducer)
