"""PIO: the gradient that it ranks by, suppression of what is alike, bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference_ops
import torch
from families import FAMILIES, IMAGE, ONE, THREE, TWO, Inputs, build, generate, shared
from families.qwen import QWEN_IDS
from families.qwen3_5 import VISION, hybrid_text
from hypothesis import given
from hypothesis import strategies as st
from method_matrix import REDUCING
from method_views import drawn, many, sample_spans, seeds, seen_by
from torch import Tensor, nn
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

import duet_vlm
from duet_vlm.methods.decoder.pio import Pio
from duet_vlm.ops.greedy import cosine, greedy_nms


@many
@given(samples=sample_spans(), seed=seeds, exact=st.booleans(), threshold=st.sampled_from([-1.0, 0.0, 0.4, 0.8, 1.0]))
def test_suppression(samples: list[tuple[int, int]], seed: int, exact: bool, threshold: float) -> None:
    rows, score, valid, count = drawn(samples, seed, exact)
    threshold = threshold if exact or abs(threshold) < 1 else threshold * 0.99  # rounded cosines of a row with itself
    chosen = greedy_nms(cosine(rows, valid), score, valid, count, int(count.max()), threshold)
    for b, (tokens, wanted) in enumerate(samples):
        expected = reference_ops.suppressed(
            rows[b, :tokens].double().tolist(), score[b, :tokens].tolist(), wanted, threshold
        )
        assert chosen[b].nonzero().flatten().tolist() == expected


def by_hand(family: str, inputs: Inputs, layer: int, through: int | None = None, by_embeddings: bool = False) -> Tensor:
    """The gradient of one prompt alone, through stock code: hooks hold what layer ``layer`` reads, and the model ends
    behind it; ``through``: behind that layer in its place; ``by_embeddings``: they are its head."""
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


@pytest.mark.parametrize(
    ("layer", "probe", "through"), [(1, "next", 1), (2, "next", 4), (3, "next", 4), (7, "last", 4)]
)
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
        (
            "LFLLFLLL",
            {"schedule": ((5, 0.5),)},
            "pio drops before decoder layer 5, but qwen3_5 has no attention from there on .* drop earlier",
        ),
        (
            "LLFLLFLF",
            {"schedule": ((2, 0.5),), "probe": "last"},
            "pio drops before decoder layer 2, .* no attention before .* from layer 3 on",
        ),
    ],
)
def test_a_gradient_without_a_layer_to_go_through_is_refused(
    kinds: str, settings: dict[str, Any], message: str
) -> None:
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
        assert torch.equal(
            generate(model, plain, 8).sequences, generate(model, plain, 8, assistant_model=build(family)).sequences
        )


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
        assert (
            view.gradient.dtype == torch.float32
            and view.gradient.isfinite().all()
            and view.gradient[view.valid].norm(dim=-1).min() > 0
        )


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
