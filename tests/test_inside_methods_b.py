"""Methods inside the decoder against slow twins: gradients and suppression, approximation, residuals, strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import twins
from cases import REDUCING
from families import FAMILIES, IMAGE, ONE, THREE, TWO, Inputs, build, generate, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import duet_vlm
from duet_vlm.methods.pio import Pio
from duet_vlm.ops.greedy import cosine, suppress

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
    chosen = suppress(cosine(rows, valid), score, valid, count, int(count.max()), threshold)
    for b, (tokens, wanted) in enumerate(samples):
        expected = twins.suppressed(rows[b, :tokens].double().tolist(), score[b, :tokens].tolist(), wanted, threshold)
        assert chosen[b].nonzero().flatten().tolist() == expected


def seen_by(model: nn.Module, inputs: Inputs, **changes: Any) -> list[Any]:
    """The views that ``pio`` decides on in one forward."""
    seen: list[Any] = []

    class Spy(Pio):
        def t2v(self, view: Any) -> Tensor:
            seen.append(view)
            return super().t2v(view)

    with torch.no_grad(), duet_vlm.attach(model, Spy(**{"schedule": ((2, 0.5),)} | changes)):
        model(**inputs)
    return seen


def by_hand(family: str, inputs: Inputs, layer: int) -> Tensor:
    """The gradient of one prompt alone, through stock code: hooks hold what layer ``layer`` reads, and the model ends behind it."""
    model = build(family, "eager")
    text = FAMILIES[family].text(model)
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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llava", "llava_gqa", "qwen2_5_vl"])
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
