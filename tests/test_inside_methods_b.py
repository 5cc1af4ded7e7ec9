"""Methods inside the decoder against slow twins: gradients and suppression, approximation, residuals, strides."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import reference_ops
import torch
from families import FAMILIES, IMAGE, ONE, THREE, TWO, Inputs, Picture, build, generate, shared
from families.qwen import QWEN_IDS
from families.qwen3_5 import VISION, hybrid_text
from hypothesis import given, settings
from hypothesis import strategies as st
from method_matrix import REDUCING
from torch import Tensor, nn
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

import duet_vlm
from duet_vlm import DecoderView, EncoderView, Selection, SpanPlan
from duet_vlm.methods.adsc import Adsc
from duet_vlm.methods.apet import ApET
from duet_vlm.methods.pio import Pio
from duet_vlm.methods.sieve import Sieve
from duet_vlm.ops.greedy import cosine, greedy_discounted, greedy_nms
from duet_vlm.ops.information import residual
from duet_vlm.ops.merge import merged_rows

many = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)

# lengths 1 and 2, so that every cosine is a multiple of 1/2 and exact
EXACT = [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, -1.0, 0], [1.0, 1, 1, 1], [1.0, -1, 1, 1], [-1.0, 1, 1, -1], [0.0, 0, 0, 0]]


@st.composite
def spans(draw: Any, largest: int = 12) -> list[tuple[int, int]]:
    """(tokens, how many to choose) of up to three samples, all of them included."""
    sizes = draw(st.lists(st.integers(1, largest), min_size=1, max_size=3))
    return [(n, draw(st.integers(1, n))) for n in sizes]


def drawn(samples: list[tuple[int, int]], seed: int, exact: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, scores, valid and counts, padded on the right with what must not matter."""
    draw, width = torch.Generator().manual_seed(seed), max(n for n, _ in samples)
    shape = (len(samples), width)
    rows = torch.tensor(EXACT)[torch.randint(len(EXACT), shape, generator=draw)] if exact else torch.randn(*shape, 5, generator=draw)
    score = torch.randint(1, 4, shape, generator=draw) / 4 if exact else torch.rand(shape, generator=draw)
    valid = torch.arange(width) < torch.tensor([n for n, _ in samples])[:, None]
    return rows, score, valid, torch.tensor([count for _, count in samples])


# ---- pio


@many
@given(samples=spans(), seed=seeds, exact=st.booleans(), threshold=st.sampled_from([-1.0, 0.0, 0.4, 0.8, 1.0]))
def test_suppression(samples: list[tuple[int, int]], seed: int, exact: bool, threshold: float) -> None:
    rows, score, valid, count = drawn(samples, seed, exact)
    threshold = threshold if exact or abs(threshold) < 1 else threshold * 0.99  # rounded cosines of a row with itself
    chosen = greedy_nms(cosine(rows, valid), score, valid, count, int(count.max()), threshold)
    for b, (tokens, wanted) in enumerate(samples):
        expected = reference_ops.suppressed(rows[b, :tokens].double().tolist(), score[b, :tokens].tolist(), wanted, threshold)
        assert chosen[b].nonzero().flatten().tolist() == expected


def seen_by(model: nn.Module, inputs: Inputs, **changes: Any) -> list[Any]:
    """The views that ``pio`` decides on in one forward."""
    seen: list[Any] = []

    class Spy(Pio):
        def prune_tokens(self, view: Any) -> Tensor:
            seen.append(view)
            return super().prune_tokens(view)

    with torch.no_grad(), duet_vlm.attach(model, Spy(**{"schedule": ((2, 0.5),)} | changes)):
        model(**inputs)
    return seen


def by_hand(family: str, inputs: Inputs, layer: int, through: int | None = None, by_embeddings: bool = False) -> Tensor:
    """The gradient of one prompt alone, through stock code: hooks hold what layer ``layer`` reads, and the model ends behind it; ``through``: behind
    that layer in its place; ``by_embeddings``: they are its head."""
    model = build(family, "eager")
    if by_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    text = FAMILIES[family].text(model)
    if through is not None:
        text.layers[layer] = copy.deepcopy(text.layers[through])
        text.config.layer_types = [*text.config.layer_types[:layer], text.config.layer_types[through]]
    held: list[Tensor] = []

    def hold(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        held.append((args[0] if args else kwargs["hidden_states"]).detach().requires_grad_())
        return ((held[0], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": held[0]})

    text.layers[layer].register_forward_pre_hook(hold, with_kwargs=True)
    del text.layers[layer + 1 :]
    text.config.num_hidden_layers = layer + 1
    with torch.enable_grad():
        rows = model(**inputs, use_cache=False).logits[0, -5:-1].float()
        loss = -rows.log_softmax(-1).amax(-1).mean()
        return torch.autograd.grad(loss, held[0])[0][0]


@pytest.mark.parametrize("layer", [1, 4])
@pytest.mark.parametrize("family", ["llava", "llava_gqa", "qwen2_5_vl"])
def test_the_gradient_is_that_of_a_model_that_ends_behind_the_next_layer(family: str, layer: int) -> None:
    inputs = FAMILIES[family].inputs([ONE])
    (view,) = seen_by(shared(family), inputs, schedule=((layer, 0.5),))
    expected = by_hand(family, inputs, layer)
    visual = expected[(inputs["input_ids"][0] == IMAGE).nonzero().flatten()]
    torch.testing.assert_close(view.gradient[0][view.valid[0]], visual[: int(view.valid.sum())], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("layer", "probe", "through"), [(1, "next", 1), (2, "next", 4), (3, "next", 4), (7, "last", 4)])
def test_the_gradient_goes_past_layers_with_a_state(layer: int, probe: str, through: int) -> None:
    """A row fades on its way through a state, and the gradient with it; layers 1, 4 and 7 have attention."""
    inputs = FAMILIES["qwen3_5"].inputs([ONE])
    (view,) = seen_by(shared("qwen3_5"), inputs, schedule=((layer, 0.5),), probe=probe)
    expected = by_hand("qwen3_5", inputs, layer, through, by_embeddings=probe == "last")
    visual = expected[(inputs["input_ids"][0] == IMAGE).nonzero().flatten()]
    torch.testing.assert_close(view.gradient[0][view.valid[0]], visual[: int(view.valid.sum())], rtol=1e-3, atol=1e-6)
    assert view.gradient[0].norm(dim=-1).min() > 1e-4 * view.gradient[0].norm(dim=-1).max()


@pytest.mark.parametrize(
    ("kinds", "settings", "message"),
    [
        ("LFLLFLLL", {"schedule": ((5, 0.5),)}, "pio drops before decoder layer 5, but qwen3_5 has no attention from there on .* drop earlier"),
        ("LLFLLFLF", {"schedule": ((2, 0.5),), "probe": "last"}, "pio drops before decoder layer 2, .* no attention before .* from layer 3 on"),
    ],
)
def test_a_gradient_without_a_layer_to_go_through_is_refused(kinds: str, settings: dict[str, Any], message: str) -> None:
    config = Qwen3_5Config(vision_config=VISION, text_config=hybrid_text(kinds), **QWEN_IDS)
    with pytest.raises(ValueError, match=message):
        duet_vlm.attach(Qwen3_5ForConditionalGeneration(config), "pio", **settings)


@pytest.mark.parametrize("probe", ["next", "last"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_drafts_are_no_part_of_what_is_predicted(family: str, probe: str) -> None:
    """Assisted decoding appends guesses to the prompt; the saliency of its tokens is that of the prompt alone."""
    model, made, prompt = build(family), FAMILIES[family], (*ONE, 52, 13, 47)
    plain, guessed = made.inputs([prompt]), made.inputs([(*prompt, 21, 22, 23)])
    views = []
    for inputs, kept in ((plain, 1), (guessed, 4)):
        views += seen_by(model, inputs | {"logits_to_keep": kept}, probe=probe)
    torch.testing.assert_close(views[1].gradient, views[0].gradient, rtol=1e-4, atol=1e-7)
    with duet_vlm.attach(model, "pio", budget=0.4, probe=probe):
        assert torch.equal(generate(model, plain, 8).sequences, generate(model, plain, 8, assistant_model=build(family)).sequences)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llava", "llava_gqa", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe"])
def test_the_gradient_of_a_padded_prompt_is_that_of_the_prompt_alone(family: str, side: str) -> None:
    rows = [ONE, THREE, TWO]
    (together,) = seen_by(shared(family), FAMILIES[family].inputs(rows, side))
    for sample, row in enumerate(rows):
        (alone,) = seen_by(shared(family), FAMILIES[family].inputs([row]))
        ours, expected = together.gradient[sample][together.valid[sample]], alone.gradient[0][alone.valid[0]]
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=float(expected.abs().max()) * 1e-4)


@pytest.mark.parametrize("generating", [False, True])
def test_a_gradient_leaves_no_trace(generating: bool) -> None:
    model = build("llava")
    inputs = FAMILIES["llava"].inputs([ONE])
    model.train(not generating)
    flags = [p.requires_grad for p in model.parameters()]
    with duet_vlm.attach(model, "pio", **REDUCING["pio"]), torch.no_grad():
        out = generate(model, inputs) if generating else model(**inputs).logits
    assert all(p.grad is None for p in model.parameters()) and [p.requires_grad for p in model.parameters()] == flags
    assert generating or not out.requires_grad


def test_half_precision_chooses_by_a_finite_gradient() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        (view,) = seen_by(build("llava", dtype=dtype), FAMILIES["llava"].inputs([ONE]))
        assert view.gradient.dtype == torch.float32 and view.gradient.isfinite().all() and view.gradient[view.valid].norm(dim=-1).min() > 0


def test_gradients_are_refused_where_there_are_none() -> None:
    model, inputs = build("llava"), FAMILIES["llava"].inputs([ONE])
    with duet_vlm.attach(model, "pio", **REDUCING["pio"]):
        with pytest.raises(ValueError, match=r"pio .* cannot be trained through"):
            model(**inputs, labels=inputs["input_ids"])
        with torch.inference_mode(), pytest.raises(ValueError, match=r"inference_mode\(\) forbids"):
            model(**inputs)
        with torch.no_grad():
            model(**inputs)  # and goes on


def test_what_pio_refuses() -> None:
    with pytest.raises(ValueError, match=r"tau=1\.5.*\[-1, 1\]"):
        Pio(schedule=((2, 0.5),), tau=1.5)
    with pytest.raises(ValueError, match="probe='first'"):
        Pio(schedule=((2, 0.5),), probe="first")


def test_a_count_of_zero_leaves_its_stage_out_in_the_released_code() -> None:
    assert Pio.official((1, 3, 4), (24, 0, 6)).schedule == ((1, 24), (4, 6))
    assert Pio.official((1, 3, 4), (24, 24, 30)).schedule == ((1, 24),)  # nothing to drop


# ---- apet


def shown(rows: Tensor, valid: Tensor, count: Tensor) -> DecoderView:
    counts = tuple(zip(valid.sum(1).tolist(), count.tolist(), strict=True))
    return DecoderView(valid, count, host_counts=counts, hidden_states=rows)


@many
@given(samples=spans(), seed=seeds, basis=st.integers(1, 5))
def test_approximation(samples: list[tuple[int, int]], seed: int, basis: int) -> None:
    rows, _, valid, count = drawn(samples, seed, exact=False)
    chosen = ApET(keep=0.5, basis=basis, ridge=1e-2).prune_tokens(shown(rows, valid, count))
    for b, (tokens, wanted) in enumerate(samples):
        kept, joined = reference_ops.approximated(rows[b, :tokens].double().tolist(), wanted, basis, 1e-2)
        assert chosen.index[b][chosen.valid[b]].tolist() == kept
        ours: dict[int, list[int]] = {}
        for member, row in zip(chosen.source_tokens[b].tolist(), chosen.target_row[b].tolist(), strict=True):
            if row >= 0:
                ours.setdefault(int(chosen.index[b, row]), []).append(member)
        assert ours == joined


@pytest.mark.parametrize("slots, share", [("released", 0.0), ("released", 0.5), ("behind", 0.0)])
@pytest.mark.parametrize("inside", [False, True])
def test_released_rows_weigh_one_and_neighbours_in_the_batch_change_nothing(slots: str, share: float, inside: bool) -> None:
    rows, _, valid, count = drawn([(12, 5), (7, 7), (9, 1), (10, 2)], 3, exact=False)
    method = ApET(keep=0.5, basis=3, slots=slots, own_share=share)

    def of(rows: Tensor, valid: Tensor, count: Tensor) -> Selection:
        plans = tuple(SpanPlan(n, int(k), 0, ()) for n, k in zip(valid.sum(1).tolist(), count.tolist(), strict=True))
        return method.prune_tokens(shown(rows, valid, count)) if inside else method.select_tokens(EncoderView(valid, count, count * 0, plans, features=rows))

    together = of(rows, valid, count)
    made = merged_rows(rows, together)
    for b, tokens in enumerate(valid.sum(1).tolist()):
        alone = of(rows[b : b + 1, :tokens], valid[b : b + 1, :tokens], count[b : b + 1])
        real = together.valid[b]
        assert together.index[b][real].tolist() == alone.index[0][alone.valid[0]].tolist() and int(real.sum()) == int(count[b])
        torch.testing.assert_close(made[b][real], merged_rows(rows[b : b + 1, :tokens], alone)[0][alone.valid[0]])
        joins = together.target_row[b] >= 0
        weight = torch.zeros(made.shape[1]).index_add(0, together.target_row[b][joins], together.weights[b][joins])
        torch.testing.assert_close(weight[weight > 0], torch.ones(int((weight > 0).sum())))
    torch.testing.assert_close(made[1], rows[1, together.index[1]])  # nothing leaves, so nothing is merged


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"basis": 0}, "basis=0"), ({"ridge": 0.0}, "ridge=0.0"), ({"start": -1}, "start=-1"), ({"own_share": 1.0}, "own_share=1.0"),
        ({"slots": "mine"}, "slots='mine'"), ({"cls_token": True, "positions": "compact"}, "cls_token=True"),
    ],
)  # fmt: skip
def test_what_apet_refuses(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ApET(**{"keep": 0.5} | wrong)


def test_apet_counts_as_released() -> None:
    assert ApET.official_qwen(0.58).plan(50, 4, None).entry == 28  # the truncated float product
    assert ApET(keep=0.58).plan(50, 4, None).entry == 29


def test_tokens_that_are_all_one_are_approximated_exactly() -> None:
    """A blank picture: the Gram matrix of the basis is singular however small its ridge is."""
    for size in (1.0, 100.0, 1e4):
        rows = size * torch.randn(2, 1, 33, generator=torch.Generator().manual_seed(1)).expand(2, 20, 33)
        assert residual(rows, rows[:, :10], 1e-5).abs().max() <= 1e-2 * size
        every = torch.ones(2, 20, dtype=torch.bool)
        chosen = ApET(keep=0.5).prune_tokens(shown(rows, every, torch.tensor([12, 12])))
        assert chosen.valid.sum(1).tolist() == [12, 12] and merged_rows(rows, chosen).isfinite().all()


# ---- sieve


@many
@given(samples=spans(), seed=seeds, exact=st.booleans())
def test_discounted(samples: list[tuple[int, int]], seed: int, exact: bool) -> None:
    rows, score, valid, count = drawn(samples, seed, exact)
    chosen = greedy_discounted(cosine(rows, valid).square(), score, valid, count, int(count.max()))
    for b, (tokens, wanted) in enumerate(samples):
        expected = reference_ops.discounted(rows[b, :tokens].double().tolist(), score[b, :tokens].tolist(), wanted)
        assert chosen[b].nonzero().flatten().tolist() == expected


@many
@given(samples=spans(), seed=seeds, words=st.integers(1, 6), heads=st.integers(1, 5), best=st.integers(1, 4))
def test_sieve(samples: list[tuple[int, int]], seed: int, words: int, heads: int, best: int) -> None:
    rows, _, valid, count = drawn(samples, seed, exact=False)
    draw = torch.Generator().manual_seed(seed + 1)
    scores, text = torch.rand(*valid.shape, heads, generator=draw), torch.randn(len(samples), words, 5, generator=draw)
    said = torch.arange(words) < torch.randint(1, words + 1, (len(samples), 1), generator=draw)
    view = replace(shown(rows, valid, count), scores=scores * valid[..., None], text_hidden_states=text, text_valid=said)
    chosen = Sieve(schedule=((2, 0.5),), heads=best).prune_tokens(view)
    for b, (tokens, wanted) in enumerate(samples):
        seen = text[b][said[b]].double().tolist()
        expected = reference_ops.sieved(rows[b, :tokens].double().tolist(), seen, scores[b, :tokens].double().tolist(), wanted, best, 0.75)
        assert chosen[b].nonzero().flatten().tolist() == expected


def test_what_the_text_says_already_leaves_first() -> None:
    """Two words span a plane; with equal attention the tokens in it leave."""
    text = torch.tensor([[[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 0]]])
    rows = torch.tensor([[[2.0, 1, 0, 0], [0, 0, 1.0, 0], [1.0, 3, 0, 0], [0, 0, 0, 1.0]]])
    every = torch.ones(1, 4, dtype=torch.bool)
    view = DecoderView(every, torch.tensor([2]), host_counts=((4, 2),), hidden_states=rows, text_hidden_states=text, text_valid=every[:, :3], scores=torch.ones(1, 4, 2))
    assert Sieve(schedule=((2, 0.5),), energy=1.0).prune_tokens(view).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("wrong, said", [({"heads": 0}, "heads=0"), ({"energy": 0.0}, "energy=0.0"), ({"energy": 1.5}, "energy=1.5")])
def test_what_sieve_refuses(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sieve(schedule=((2, 0.5),), **wrong)


# ---- adsc


@pytest.mark.parametrize("tokens, keep, kept", [(8, 4, [1, 3, 5, 7]), (9, 3, [2, 5, 8]), (7, 3, [2, 4, 6]), (5, 1, [4]), (4, 4, [0, 1, 2, 3])])
def test_the_last_of_each_stride_stays(tokens: int, keep: int, kept: list[int]) -> None:
    every = torch.ones(1, tokens, dtype=torch.bool)
    view = DecoderView(every, torch.tensor([keep]), host_counts=((tokens, keep),))
    assert Adsc(schedule=((2, 0.5),)).prune_tokens(view)[0].nonzero().flatten().tolist() == kept


def test_strides_halve_within_strides() -> None:
    """The paper's halving: after two stages the last of every four."""
    model, family = shared("llava"), FAMILIES["llava"]
    with torch.no_grad(), duet_vlm.attach(model, "adsc", schedule=((2, 0.5), (4, 0.25))) as handle:
        model(**family.inputs([ONE]))
        (span,) = handle.trace[0]
    assert span.span.tokens == 36
    assert [stage.kept for stage in span.stages[-2:]] == [tuple(range(1, 36, 2)), tuple(range(3, 36, 4))]


# ---- half precision


def held_by_layers(model: nn.Module, family: str, inputs: Inputs, kept: list[Tensor], replace_up_to: int = -1) -> list[Any]:
    """Hooks that note what each decoder layer reads, or hand the first ones what was noted."""

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any], layer: int) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer > replace_up_to:
            kept.append(hidden.clone()) if replace_up_to < 0 else None
            return None
        return ((kept[layer], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": kept[layer]})

    layers = FAMILIES[family].text(model).layers
    return [
        layer.register_forward_pre_hook(partial(note, layer=i), with_kwargs=True, prepend=True) for i, layer in enumerate(layers)
    ]


@pytest.mark.parametrize("method", ["tokencarve", "dart", "sparsevlm", "sieve", "fastv"])
@pytest.mark.parametrize("name", ["llava", "llava_gqa"])
def test_equal_rows_in_half_precision_are_ranked_alike_wherever_a_prompt_begins(name: str, method: str) -> None:
    """Rounded rotary tables made attention and the length of keys depend on the padding in front of a prompt."""
    model, made = build(name, dtype=torch.bfloat16), FAMILIES[name]
    settings: dict[str, Any] = {"schedule": ((2, 0.5),)} if method != "fastv" else {"layers": 2, "keep": 0.5}
    for seed in range(6):
        row, longer = (1, 5, Picture(100 + seed, 4, 5), *range(7, 13)), (1, Picture(200 + seed, 4, 5), *range(20, 57))
        both, alone = (in_half(made.inputs(rows)) for rows in ([longer, row], [row]))
        real = both["attention_mask"][1].bool()
        with torch.no_grad(), duet_vlm.attach(model, method, **settings) as handle:
            kept: list[Tensor] = []
            hooks = held_by_layers(model, name, both, kept)
            model(**both)
            together = handle.trace[1][0].stages
            for hook in hooks:
                hook.remove()
            kept = [hidden[1:][:, real] for hidden in kept[:3] if hidden.shape[1] == len(real)]
            hooks = held_by_layers(model, name, alone, kept, len(kept) - 1)
            model(**alone)
            for hook in hooks:
                hook.remove()
            assert [stage.kept for stage in handle.trace[0][0].stages] == [stage.kept for stage in together]


def in_half(inputs: Inputs) -> Inputs:
    return {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}


def test_the_gradient_in_half_precision_is_that_of_a_prompt_that_begins_at_the_first_place() -> None:
    """The same numbers, to the last bit, for prompts of one length at other positions."""
    model, made = build("llava", dtype=torch.bfloat16), FAMILIES["llava"]
    inputs = in_half(made.inputs([ONE]))
    places = torch.arange(inputs["input_ids"].shape[1])[None]
    views = []
    rows: list[Tensor] = []
    for begin in (0, 37):
        hooks = held_by_layers(model, "llava", inputs, rows, -1 if begin == 0 else 2)
        views += seen_by(model, inputs | {"position_ids": places + begin})
        for hook in hooks:
            hook.remove()
    assert torch.equal(views[0].gradient, views[1].gradient)
