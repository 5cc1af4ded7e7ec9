"""Re-entry: tokens that a layer leaves out sleep and may come back; against a slow twin that loops over the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXED, ONE, TEXT, THREE, TWO, Picture, Row, build, forward, generate, shared, untouched
from method_matrix import REDUCING, allowed
from reference_forward import Choice, choices_of, step_logits, walk_batch
from test_training import gradients, labels_of
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.functional import cross_entropy

import duet_vlm
from duet_vlm import DecoderReducer, DecoderView, SpanPlan
from duet_vlm.ops.select import top
from duet_vlm.planning.budget import layer_counts
from duet_vlm.profiling.flop_counter import count_flops
from duet_vlm.reducers.decoder import decisions
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.serve.decoder_stages import check_decoder_method
from duet_vlm.utils.field_types import merged

CLOSE = {"rtol": 1e-3, "atol": 5e-4}
RAGGED: tuple[Row, ...] = (ONE, THREE, TEXT, TWO)
KINDS = ("stage", "layer")
SOME = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "qwen3_5")
SCHEDULE = ((2, 0.5), (4, 0.25), (6, 0.6))  # more come back than had stayed


def _sleeps(method: str) -> bool:
    """Whether a method of the matrix decides inside the decoder, by what is known of a sleeping token."""
    last = duet_vlm.list_methods()[method.rpartition("+")[2]]
    inside = issubclass(last, DecoderReducer) and not last.merges
    return inside and Input.PREVIOUS_HIDDEN_STATES not in last().requires


METHODS = tuple(filter(_sleeps, REDUCING))


def dealt() -> list[tuple[str, str, str, str]]:
    """(family, method, kind of re-entry, positions): every method with both kinds, every family with some methods."""
    families, cells = list(FAMILIES), []
    for number, (kind, method) in enumerate((kind, method) for kind in KINDS for method in METHODS):
        order = families[number % len(families) :] + families
        family = next(name for name in order if allowed(name, method))
        positions = "compact" if number % 3 == 0 and allowed(family, positions="compact") else "keep"
        cells.append((family, method, kind, positions))
    return cells


def attach(model: nn.Module, method: str, kind: str, positions: str = "keep") -> duet_vlm.Handle:
    options = {"options": {"reentry": kind, "positions": positions}}
    return duet_vlm.attach(model, method, **merged(REDUCING[method], options))


def equal_to_oracle(family: str, logits: Any, inputs: Any, choices: list[Choice], said: Tensor) -> None:
    walks = walk_batch(shared(family, "eager"), inputs, choices, said)
    for ours, expected in zip(logits, step_logits(walks, choices, said.shape[1]), strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)


# ---- against the slow twin


def test_every_family_and_method_is_tried() -> None:
    assert {family for family, *_ in dealt()} == set(FAMILIES) and len(METHODS) >= 18
    assert {(method, kind) for _, method, kind, _ in dealt()} == {(m, kind) for m in METHODS for kind in KINDS}


@pytest.mark.every_family
@pytest.mark.parametrize(("family", "method", "kind", "positions"), dealt())
def test_answers_equal_the_oracle_and_costs_the_plan(family: str, method: str, kind: str, positions: str) -> None:
    made, model = FAMILIES[family], shared(family)
    inputs = made.inputs(RAGGED)
    with attach(model, method, kind, positions) as handle:
        cached = generate(model, inputs)
        choices, report, traces = choices_of(handle), handle.report(), handle.trace
        plans = [[handle.plan(span.span.tokens) for span in row] for row in traces]
        uncached = generate(model, inputs, use_cache=False)
    said = cached.sequences[:, inputs["input_ids"].shape[1] :]
    equal_to_oracle(family, cached.logits, inputs, choices, said)
    for a, b in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    assert report.predicted == report.observed
    counts = [[sum(plan.counts[layer] for plan in row) for layer in range(8)] for row in plans]
    assert report.measured == tuple(sum(layer) / len(RAGGED) for layer in zip(*counts, strict=True))
    text = [choice.slots - sum(map(len, choice.places)) for choice in choices]
    for layer, entry in enumerate(cached.past_key_values.layers):
        if hasattr(entry, "keys"):
            rows = max(n + count[layer] for n, count in zip(text, counts, strict=True))
            assert entry.get_seq_length() == rows + said.shape[1] - 1
    for span in (span for row in traces for span in row):
        entered = set(span.stages[0].kept)
        for stage in span.stages[1:]:
            assert not stage.dropped and not set(stage.kept) & set(stage.asleep)
            assert set(stage.kept) | set(stage.asleep) == entered


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3", "qwen3_5"])
def test_awake_are_those_with_the_largest_scores_of_all(family: str) -> None:
    """By the attention maps of the oracle, in which sleeping tokens are keys with the states that they have."""
    inputs, model, came_back = FAMILIES[family].inputs(RAGGED), shared(family), 0
    with duet_vlm.attach(model, "duet", schedule=SCHEDULE, options={"reentry": "layer"}) as handle:
        forward(model, inputs)
        choices = choices_of(handle)
    stages = [layer for layer in choices[0].alive if layer > 0]
    assert stages == [2, 3, 4, 5, 6, 7]
    watch = [FAMILIES[family].ranking(layer) for layer in stages]
    walks = walk_batch(shared(family, "eager"), inputs, choices, watch=watch)
    for choice, walk in zip(choices, walks, strict=True):
        visual = {slot for places in choice.places for slot in places}
        if not visual:
            continue
        for stage, scored in zip(stages, watch, strict=True):
            score = walk.attention[scored][max(visual) + 1 :].mean(0)
            awake = choice.visible(stage) & visual
            asleep = visual - awake
            assert float(score[sorted(awake)].min()) >= float(score[sorted(asleep)].max()) - 1e-5
            came_back += len(awake - choice.visible(stage - 1))
    assert came_back > 10


@pytest.mark.parametrize("family", SOME)
def test_duet_plus_wakes_what_any_head_looks_at(family: str) -> None:
    """By attention head by head, as another method is given it."""
    inputs, model, seen = FAMILIES[family].inputs([ONE]), shared(family), []

    class ByHead(duet_vlm.get_method("sieve")):  # type: ignore[misc]
        requires = frozenset({Input.SCORES})

        def prune_tokens(self, view: DecoderView) -> Tensor:
            seen.append(view.require(Input.SCORES).amax(-1))
            return top(seen[-1], view.valid, view.num_keep)

    options = {"reentry": "layer", "text_query": "last"}
    schedule = ((1, 0.4),)
    with duet_vlm.attach(model, ByHead(schedule=schedule, options=options)) as handle:
        forward(model, inputs)
        expected = [stage.kept for stage in handle.trace[0][0].stages]
    with duet_vlm.attach(model, "duet_plus", schedule=schedule, options=options) as handle:
        forward(model, inputs)
        assert [stage.kept for stage in handle.trace[0][0].stages] == expected
    assert len(seen) == 7


@pytest.mark.parametrize("family", SOME)
def test_a_padded_row_equals_that_row_alone(family: str) -> None:
    made, model = FAMILIES[family], shared(family)
    with duet_vlm.attach(model, "pyramiddrop", schedule=SCHEDULE, options={"reentry": "layer"}) as handle:
        for side in ("left", "right"):
            together = forward(model, made.inputs(RAGGED, side)).logits
            traces, slots = handle.trace, handle.slots
            for sample, row in enumerate(RAGGED):
                alone = forward(model, made.inputs([row])).logits
                torch.testing.assert_close(together[sample][slots[sample] >= 0], alone[0], **CLOSE)
                if row is not TEXT:
                    kept = [[stage.kept for stage in span.stages] for span in handle.trace[0]]
                    assert kept == [[stage.kept for stage in span.stages] for span in traces[sample]]


# ---- what may not change


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("kind", KINDS)
def test_all_awake_is_bit_equal(family: str, kind: str, attention: str) -> None:
    plain, inputs = untouched(family, attention, MIXED), FAMILIES[family].inputs(MIXED)
    model = shared(family, attention)
    for settings in ({"schedule": ((2, 1.0), (4, 1.0), (6, 1.0))}, {"budget": 1.0}):
        with duet_vlm.attach(model, "pyramiddrop", **settings, options={"reentry": kind}):
            assert torch.equal(plain.logits, forward(model, inputs).logits)
            written = generate(model, inputs)
        assert all(torch.equal(a, b) for a, b in zip(plain.steps, written.logits, strict=True))
    assert torch.equal(plain.logits, forward(model, inputs).logits)  # nothing is left behind


@dataclass(frozen=True)
class Fixed(DecoderReducer):
    """Every token has one score from the first layer to the last, so chosen sets shrink with their counts."""

    name, paper, summary = "fixed", "-", "-"
    requires = frozenset({Input.TOKENS, Input.HIDDEN_STATES})
    schedule: Any = ((2, 0.6), (4, 0.4), (6, 0.2))
    seen: Callable[[DecoderView], None] = lambda view: None

    def plan(self, tokens: int, depth: int, budget: Any) -> SpanPlan:
        return SpanPlan(tokens, tokens, 0, layer_counts(tokens, depth, self.schedule, may_grow=self.reenters))

    def prune_tokens(self, view: DecoderView) -> Tensor:
        self.seen(view)
        span, token = view.require(Input.TOKENS)
        return top((span * 31 + token * 7).remainder(13) + 0.01 * token, view.valid, view.num_keep)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("kind", KINDS)
def test_a_set_that_only_shrinks_is_deletion(family: str, kind: str) -> None:
    inputs, model, logits = FAMILIES[family].inputs(RAGGED), shared(family), []
    for reentry in ("none", kind):
        with duet_vlm.attach(model, Fixed(options=TokenOptions(reentry=reentry))) as handle:
            with_padding = forward(model, inputs).logits
            logits.append((with_padding[handle.slots >= 0], *generate(model, inputs).logits))
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))


@pytest.mark.parametrize(("family", "first", "changes"), [("llava", 2, False), ("qwen3_vl", 1, True)])
def test_the_state_of_a_sleeping_token(family: str, first: int, changes: bool) -> None:
    """Untouched, but for the features of deepstack, which the decoder adds behind its first layers to every token."""
    model, inputs, states = shared(family), FAMILIES[family].inputs([ONE]), []

    def seen(view: DecoderView) -> None:
        states.append(view.require(Input.HIDDEN_STATES)[0].clone())

    method = Fixed(schedule=((first, 0.5), (5, 0.7)), seen=seen, options=TokenOptions(reentry="stage"))
    with duet_vlm.attach(model, method) as handle:
        written = generate(model, inputs)
        choices, asleep = choices_of(handle), list(handle.trace[0][0].stages[1].asleep)
    awake = [token for token in range(len(states[0])) if token not in asleep]
    assert asleep and torch.equal(states[0][asleep], states[1][asleep]) != changes
    assert (states[0][awake] != states[1][awake]).any(-1).all()
    equal_to_oracle(family, written.logits, inputs, choices, written.sequences[:, inputs["input_ids"].shape[1] :])


def test_no_awake_token_sees_a_sleeping_one() -> None:
    """A change of the states of those asleep is seen at the next decision, not in the layers before it."""
    model, inputs, outputs, logits = shared("llava"), FAMILIES["llava"].inputs([ONE]), [], []
    method = Fixed(schedule=((2, 0.5), (5, 0.7)), options=TokenOptions(reentry="stage"))
    with duet_vlm.attach(model, method) as handle:
        for changed in (False, True):
            found: list[Tensor] = []

            def after(
                module: Any, args: Any, output: Any, found: list[Tensor] = found, changed: bool = changed
            ) -> None:
                found.append(output[0] if isinstance(output, tuple) else output)
                if changed and len(found) == 3:
                    stream = handle._model_hooks.state.forward_contexts[-1].token_stream
                    stream.states = stream.states + 1.0

            hooks = [layer.register_forward_hook(after) for layer in FAMILIES["llava"].text(model).layers]
            logits.append(forward(model, inputs).logits)
            for hook in hooks:
                hook.remove()
            outputs.append(found)
    assert all(torch.equal(a, b) for a, b in zip(outputs[0][:5], outputs[1][:5], strict=True))
    assert not torch.equal(outputs[0][5], outputs[1][5]) and not torch.equal(*logits)


# ---- what comes after the prompt, and training


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mistral3_windows", "gemma3", "qwen3_5"])
def test_later_turns_equal_the_oracle(family: str) -> None:
    inputs, model = FAMILIES[family].inputs([ONE, TWO]), shared(family)
    width, question = inputs["input_ids"].shape[1], torch.tensor([[41, 42, 43], [44, 45, 46]])
    with duet_vlm.attach(model, "pyramiddrop", schedule=SCHEDULE, options={"reentry": "layer"}) as handle:
        first = generate(model, inputs, 3)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 6).long()], 1)
        given = {"input_ids": torch.cat([first.sequences[:, -1:], question], 1), "attention_mask": mask}
        second = generate(model, given, 3, past_key_values=first.past_key_values)
        choices = choices_of(handle)
    said = torch.cat([first.sequences[:, width:], question, second.sequences[:, 4:]], 1)
    walks = walk_batch(shared(family, "eager"), inputs, choices, said)
    expected = step_logits(walks, choices, said.shape[1])
    for ours, theirs in zip((*first.logits, *second.logits), (*expected[:3], *expected[6:]), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_beams_equal_the_oracle(family: str) -> None:
    inputs, model = FAMILIES[family].inputs(RAGGED), shared(family)
    options = {"num_beams": 3, "output_scores": True}
    with duet_vlm.attach(model, "duet", schedule=SCHEDULE, options={"reentry": "layer"}) as handle:
        cached = generate(model, inputs, 3, **options)
        choices = choices_of(handle)[::3]
        uncached = generate(model, inputs, 3, use_cache=False, **options)
    said = cached.sequences[:, inputs["input_ids"].shape[1] :]
    ours = [logits[cached.beam_indices[:, step]] for step, logits in enumerate(cached.logits)]
    equal_to_oracle(family, ours, inputs, choices, said)
    assert torch.equal(uncached.sequences, cached.sequences)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_gradients_flow_through_those_awake(family: str) -> None:
    """Also into the states that a token had before it slept; with and without checkpointing of either kind."""
    inputs = FAMILIES[family].inputs(MIXED)
    labels, found = labels_of(inputs), []
    for reentrant in (None, False, True):
        model = build(family).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        settings: dict[str, Any] = {"schedule": SCHEDULE, "options": {"reentry": "layer"}}
        with duet_vlm.attach(model, "pyramiddrop", **settings) as handle:
            output = model(**inputs, labels=labels)
            output.loss.backward()
            choices = choices_of(handle)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    oracle, terms = build(family, "eager"), []
    for sample, walk in enumerate(walk_batch(oracle, inputs, choices, differentiate=True)):
        wanted, seen = labels[sample][inputs["attention_mask"][sample].bool()], sorted(choices[sample].visible(7))
        pairs = zip(seen, seen[1:], strict=False)
        terms += [cross_entropy(walk.logits[a][None], wanted[b][None]) for a, b in pairs if wanted[b] != -100]
    expected = gradients(oracle, torch.stack(terms).mean())
    noise = 1e-6 * max(float(grad.norm()) for grad in expected.values())
    for ours in found:
        assert set(ours) == set(expected)
        for name, grad in ours.items():
            assert float((grad - expected[name]).norm()) <= 1e-3 * float(expected[name].norm()) + noise, name


def wrapped_gradients(kind: CheckpointImpl | None) -> dict[str, Tensor]:
    """Gradients of a model whose layers torch's wrapper runs again together with their hooks; None: no wrapper."""
    model, inputs = build("llava").train(), FAMILIES["llava"].inputs(MIXED)
    model.enable_input_require_grads()
    layers = FAMILIES["llava"].text(model).layers
    for index, layer in enumerate(layers) if kind is not None else ():
        layers[index] = checkpoint_wrapper(layer, kind)
    with duet_vlm.attach(model, "pyramiddrop", schedule=SCHEDULE, options={"reentry": "stage"}):
        model(**inputs, labels=labels_of(inputs), use_cache=False).loss.backward()
    named = [(name.replace("_checkpoint_wrapped_module.", ""), p.grad) for name, p in model.named_parameters()]
    return {name: grad for name, grad in named if grad is not None}


def test_layers_may_run_again_with_their_hooks() -> None:
    plain, again = wrapped_gradients(None), wrapped_gradients(CheckpointImpl.NO_REENTRANT)
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(grad, again[name], rtol=1e-4, atol=1e-6)


def test_hooks_that_first_run_without_a_gradient_are_refused() -> None:
    with pytest.raises(ValueError, match=r"re-entrant kind loses their gradient: use .*'use_reentrant': False"):
        wrapped_gradients(CheckpointImpl.REENTRANT)


# ---- counts and costs


def test_counts_may_grow_with_reentry_only() -> None:
    for method in ("pyramiddrop", "duet", "duet_plus", "vscan", "random", "metok", "dart"):
        cls = duet_vlm.get_method(method)
        with pytest.raises(ValueError, match=r"a later stage cannot keep more \(0.6\) .*'reentry': 'stage'"):
            cls(schedule=SCHEDULE)
        plan = cls(schedule=SCHEDULE, options={"reentry": "stage", "trim_kv_cache": False}).plan(20, 8, None)
        assert plan.counts[2:] == (10, 10, 5, 5, 12, 12)


def test_a_budget_gives_the_counts_that_it_gives_without() -> None:
    for method in METHODS:
        for budget in (0.3, 0.6, 0.9):
            plans = [
                duet_vlm.make_method(method, options={"reentry": kind, "trim_kv_cache": False}).plan(50, 32, budget)
                for kind in ("none", *KINDS)
            ]
            assert plans[0] == plans[1] and (plans[1] == plans[2] or method == "duet_plus")
    own = duet_vlm.make_method("duet_plus", options={"reentry": "layer"})
    assert own.plan(1000, 12, 0.11).counts == (300,) * 4 + (15,) * 8  # 4 n + 8 n / 20 within 12 x 110
    assert own.plan(1000, 12, 0.05).counts == (289,) + (28,) * 11  # n + 11 n / 10 within 12 x 50
    growing = duet_vlm.get_method("duet_plus")(schedule=SCHEDULE, options={"reentry": "stage"})
    plan = growing.plan(100, 8, 0.5)
    assert plan.counts[6] > plan.counts[4] and 49 < plan.mean <= 50


def test_stages_are_decided_anew_where_counts_stay() -> None:
    flat = ((2, 0.25), (4, 0.25), (6, 0.25))
    counts = (40, 40, *(10,) * 6)
    expected = {"none": [2], "stage": [2, 4, 6], "layer": [2, 3, 4, 5, 6, 7]}
    for kind, layers in expected.items():
        method = duet_vlm.get_method("pyramiddrop")(schedule=flat, options={"reentry": kind})
        assert decisions(method, (40, *counts)) == [(layer, 40, 10) for layer in layers]
        with duet_vlm.attach(shared("llava"), method) as handle:
            forward(shared("llava"), FAMILIES["llava"].inputs(MIXED))
            assert handle._prompt_state.record.scored_layers == tuple(layers)
    grown = duet_vlm.get_method("pyramiddrop")(schedule=SCHEDULE, options={"reentry": "layer"})
    back = (40, 40, 20, 20, 40, 40, 24, 24)
    assert decisions(grown, (40, *back)) == [(2, 40, 20), (3, 40, 20), (6, 40, 24), (7, 40, 24)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["pyramiddrop", "fastv", "duet_plus", "stateful", "pio", "fitprune", "d2pruner"])
def test_a_prompt_costs_what_was_predicted(method: str, kind: str) -> None:
    """Of each decision the keys of all tokens count, awake or asleep; the layer takes over those of the awake ones."""
    model, row = shared("llava"), (1, 5, Picture(1, 5, 7), *range(20, 34))
    inputs = FAMILIES["llava"].inputs([row])
    with torch.no_grad(), attach(model, method, kind) as handle:
        counted = count_flops(lambda: model(**inputs, logits_to_keep=1))
        report = handle.report()
    assert report.predicted.flops == pytest.approx(counted, rel=0.01)
    assert report.observed.flops == report.predicted.flops
    with torch.no_grad(), attach(model, method, "none") as handle:
        model(**inputs, logits_to_keep=1)
        assert handle.report().measured == report.measured
        assert handle.report().observed.ranking_flops <= report.observed.ranking_flops


def test_waking_all_asks_nobody() -> None:
    """Where every token is awake again there is nothing to choose."""
    model, asked = shared("llava"), []

    def seen(view: DecoderView) -> None:
        asked.append(view.host_counts[0][1])

    method = Fixed(schedule=((2, 0.5), (4, 1.0), (6, 0.3)), seen=seen, options=TokenOptions(reentry="layer"))
    with duet_vlm.attach(model, method) as handle:
        forward(model, FAMILIES["llava"].inputs([ONE]))
        decided = list(asked)  # the report asks again, on shapes
        tokens, rows = handle.report().tokens, handle.report().measured
    half, few = tokens // 2, int(tokens * 0.3)
    assert rows == (tokens, tokens, half, half, tokens, tokens, few, few)
    assert decided == [half, half, few, few]


# ---- what is refused


@pytest.mark.parametrize(
    ("method", "settings", "reason"),
    [
        ("sparsevlm", {}, "it merges tokens inside the decoder"),
        ("tokencarve", {}, "it merges tokens inside the decoder"),
        ("v2drop", {}, "it compares states of two layers"),
        ("fastv", {"trim_kv_cache": True}, "trim_kv_cache=True forgets tokens that the last layer leaves out"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_methods_whose_tokens_cannot_come_back(method: str, settings: dict[str, Any], reason: str, kind: str) -> None:
    model = shared("llava")
    with pytest.raises(ValueError, match=rf"^{method}: options.reentry='{kind}' cannot be, since .*{reason}"):
        duet_vlm.attach(model, method, budget=0.5, options={"reentry": kind} | settings)
    assert duet_vlm.handle_of(model) is None


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match=r"reentry='always': choose one of 'none', 'stage', 'layer'"):
        TokenOptions(reentry="always")
    with pytest.raises(ValueError, match=r"reentry='stage' concerns a stage that divprune does not have"):
        duet_vlm.get_method("divprune")(keep=0.5, options={"reentry": "stage"})
    with pytest.raises(ValueError, match=r"reentry='stage': a server's stages hand on the rows that stay; set 'none'"):
        check_decoder_method(duet_vlm.get_method("fastv")(options={"reentry": "stage"}))
