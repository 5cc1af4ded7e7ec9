"""Decoders that mix linear and full attention: which layer ranks, and what is refused."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import CLIP, FAMILIES, ONE, TEXT, THREE, forward, generate, randomise, shared
from families.qwen import QWEN_IDS
from families.qwen3_5 import VISION, hybrid_text
from reference_forward import choices_of, step_logits, walk_batch
from torch import Tensor, nn
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

import duet_vlm
from duet_vlm import DecoderView
from duet_vlm.methods.decoder.stateful import Stateful
from duet_vlm.models.lookup import adapter_for


def released() -> nn.Module:
    """The released order of layers: every fourth has attention."""
    config = Qwen3_5Config(vision_config=VISION, text_config=hybrid_text("LLLFLLLF"), **QWEN_IDS)
    return randomise(Qwen3_5ForConditionalGeneration(config).eval())


@dataclass(frozen=True)
class Refused:
    method: str
    settings: dict[str, Any]
    drop: int
    first: int


REFUSED = [
    Refused("fastv", {"layers": 2, "keep": 0.4}, 2, 4),
    Refused("fastv", {"layers": 3, "keep": 0.4}, 3, 4),
    Refused("duet", {"schedule": ((2, 0.5),)}, 2, 3),
    Refused("pyramiddrop", {"schedule": ((1, 0.5), (5, 0.2))}, 1, 3),
]


@pytest.mark.parametrize("refused", REFUSED, ids=str)
def test_ranking_before_the_first_attention_is_refused(refused: Refused) -> None:
    message = (
        rf"{refused.method} drops before decoder layer {refused.drop}, but qwen3_5 has no attention to rank tokens by before layer 3: "
        rf"drop before layer {refused.first} or later"
    )
    with pytest.raises(ValueError, match=message):
        duet_vlm.attach(released(), refused.method, **refused.settings)


def test_the_named_layer_is_accepted_and_methods_without_ranking_drop_anywhere() -> None:
    model, inputs = released(), FAMILIES["qwen3_5"].inputs([ONE])
    for method, settings, scored in (
        ("fastv", {"layers": 4, "keep": 0.4}, (3,)),
        ("duet", {"schedule": ((3, 0.5), (6, 0.2), (7, 0.1))}, (3, 7)),
        ("random", {"entry": 1.0, "schedule": ((1, 0.3),)}, ()),
        ("duet", {"schedule": ((2, 0.0),)}, ()),
    ):
        with duet_vlm.attach(model, method, **settings) as handle:
            forward(model, inputs)
            assert handle._prompt_state is not None and handle._prompt_state.record.scored_layers == scored
            assert handle.report().measured[7] < 20


# ---- ranked by what is read out of states


def views_of(model: nn.Module, inputs: Any, **settings: Any) -> tuple[list[DecoderView], duet_vlm.Handle]:
    seen: list[DecoderView] = []

    class Spy(Stateful):
        def prune_tokens(self, view: DecoderView) -> Tensor:
            seen.append(view)
            return super().prune_tokens(view)

    with duet_vlm.attach(model, Spy(**settings)) as handle:
        forward(model, inputs)
        return seen, handle


def written_and_read(model: nn.Module, inputs: Any, layer: int) -> list[dict[str, Tensor]]:
    """What the stock rule of one linear layer is called with, prompt by prompt."""
    found: list[dict[str, Tensor]] = []
    module = sys.modules[type(model).__module__]
    rule = module.torch_chunk_gated_delta_rule
    mixer = model.model.language_model.layers[layer].linear_attn

    def spy(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Any:
        found.append({"query": query, "key": key, "beta": given["beta"], "running": torch.tensor(running[-1])})
        return rule(query, key, value, **given)

    running: list[bool] = [False]
    hooks = [
        mixer.register_forward_pre_hook(lambda *_: running.append(True)),
        mixer.register_forward_hook(lambda *_: running.append(False)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch_chunk_gated_delta_rule", spy)
        forward(model, inputs)
    for hook in hooks:
        hook.remove()
    return [call for call in found if bool(call["running"])]


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_a_state_is_read_by_what_the_stock_rule_is_called_with(family: str) -> None:
    """The first drop ranks all rows of the prompt; heads of values share queries and keys."""
    model, inputs = shared(family), FAMILIES[family].inputs([ONE])
    seen, handle = views_of(model, inputs, power=20.0)  # 19 of 20 from layer 3 on
    run: Any = handle._prompt_state
    layer = next(layer for layer in range(8) if run.num_visual(layer) != [20])
    assert model.config.text_config.layer_types[layer] == "linear_attention"
    (call,) = written_and_read(model, inputs, layer)
    visual = run.prompt.visual[0]
    last = int(visual.nonzero().max())
    query, key = (nn.functional.normalize(call[name][0].double(), dim=-1) for name in ("query", "key"))
    beta = call["beta"][0].double()
    asking, heads = range(last + 1, len(visual)), range(beta.shape[1])
    shared_by = len(heads) // query.shape[1]
    expected = [
        sum(
            abs(float(query[t, h // shared_by] @ key[i, h // shared_by])) * float(beta[i, h])
            for t in asking
            for h in heads
        )
        for i in visual.nonzero().flatten().tolist()
    ]
    ours = seen[0].scores[0][seen[0].valid[0]].double()
    scale = len(asking) * len(heads)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64) / scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("power", [0.5, 2.0])
def test_a_padded_prompt_is_ranked_as_it_is_alone(side: str, power: float) -> None:
    model, made = shared("qwen3_5"), FAMILIES["qwen3_5"]
    rows = [ONE, THREE, TEXT, CLIP]
    with duet_vlm.attach(model, "stateful", power=power) as handle:
        logits, slots, traces = forward(model, made.inputs(rows, side)).logits, handle.slots, handle.trace
        for i, row in enumerate(rows):
            alone = forward(model, made.inputs([row])).logits[0]
            torch.testing.assert_close(logits[i][slots[i] >= 0], alone, rtol=1e-3, atol=2e-3)
            if row is not TEXT:
                assert [span.stages for span in handle.trace[0]] == [span.stages for span in traces[i]]


def test_generation_equals_the_oracle() -> None:
    """Given the same survivors, a pass over the whole sequence says the same: states are scanned without what left
    before."""
    model, inputs = shared("qwen3_5"), FAMILIES["qwen3_5"].inputs([ONE, CLIP])
    with duet_vlm.attach(model, "stateful", power=0.7, end=0.1) as handle:
        result = generate(model, inputs)
        choices = choices_of(handle)
    new = result.sequences[:, inputs["input_ids"].shape[1] :]
    expected = step_logits(walk_batch(shared("qwen3_5", "eager"), inputs, choices, new), choices, len(result.logits))
    for ours, wanted in zip(result.logits, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=2e-3)


def test_every_layer_ranks_its_own_rows_and_a_budget_is_met() -> None:
    model, inputs = released(), FAMILIES["qwen3_5"].inputs([ONE])
    with duet_vlm.attach(model, "stateful", budget=0.5) as handle:
        forward(model, inputs)
        counts = handle._prompt_state.plans[0][0].counts  # type: ignore[union-attr]
        dropping = tuple(layer for layer in range(1, 8) if 0 < counts[layer] < counts[layer - 1])
        assert handle._prompt_state.record.scored_layers == dropping and len(dropping) >= 6  # type: ignore[union-attr]
        report = handle.report()
        assert 9.5 < report.measured_mean <= 10 and report.measured == counts
        steps = [a - b for a, b in zip(counts, counts[1:], strict=False)]
        assert max(steps) <= 4  # no layer decides much


def test_adapters_without_states_say_so() -> None:
    model = shared("llava")
    with pytest.raises(TypeError, match="llava: what its layers with a state read is not known here"):
        adapter_for(model).linear_attention_scores(model, torch.zeros(1, 1, 1), torch.ones(1, 1), torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"power": 0.0}, "power=0.0: of the schedule, above 0"),
        ({"end": 1.5}, r"end=1.5: the share of tokens that the schedule comes to, in \[0, 1\]"),
        (
            {"budget": 0.1},
            r"stateful cannot reach 2 mean visual tokens per layer .* its first of 8 layers runs at full width",
        ),
        ({"budget": 0.5, "power": 2.0}, "stateful: give either budget= or the method's own settings"),
        ({}, "stateful needs a budget"),
    ],
)
def test_schedules_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    budget = settings.pop("budget", None)
    with pytest.raises(ValueError, match=message):
        duet_vlm.get_method("stateful")(**settings).plan(20, 8, budget)


def test_the_schedule_cuts_little_early_and_more_late() -> None:
    counts = duet_vlm.get_method("stateful")(power=2.0, end=0.2).plan(1000, 4, None).counts
    assert counts == (1000, 950, 800, 550)  # 1 - 0.8 (l / 4)^2
    for budget in (0.15, 0.3, 0.6, 0.9):
        plan = duet_vlm.get_method("stateful")(end=0.1).plan(3136, 32, budget)
        assert 3136 * budget - 1 < plan.mean <= 3136 * budget


def test_caches_of_linear_layers_hold_no_tokens() -> None:
    model, inputs = shared("qwen3_5"), FAMILIES["qwen3_5"].inputs([ONE])
    with duet_vlm.attach(model, "duet", budget=0.4) as handle:
        cache = forward(model, inputs, use_cache=True).past_key_values
        held = handle._prompt_state.record.cache_bytes  # type: ignore[union-attr]
        report = handle.report()
    assert [bytes_ > 0 for bytes_ in held] == [
        kind == "full_attention" for kind in model.config.text_config.layer_types
    ]
    assert (
        sum(held)
        == report.observed.kv_bytes
        == sum(c.keys.nbytes + c.values.nbytes for c in cache.layers if hasattr(c, "keys"))
    )
