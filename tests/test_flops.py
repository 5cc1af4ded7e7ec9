"""Predicted FLOPs against what torch counts, within 1 %: whole prompts under every method, decoders of every kind
alone, decode steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import FAMILIES, Picture, Row, build, clips_for, shared
from method_matrix import REDUCING, pairs
from torch import nn
from torch.nn import functional as F
from transformers import (
    Gemma3TextConfig,
    Gemma3TextModel,
    Glm4vMoeTextConfig,
    Glm4vMoeTextModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen3_5MoeTextConfig,
    Qwen3_5MoeTextModel,
    Qwen3_5TextConfig,
    Qwen3_5TextModel,
    Qwen3VLMoeTextConfig,
    Qwen3VLMoeTextModel,
)

import duet_vlm
from duet_vlm.evaluation import tiny
from duet_vlm.models.lookup import adapter_for
from duet_vlm.profiling.flop_counter import cache_bytes, count_flops
from duet_vlm.profiling.flops import decoder_layer_flops, prefill_flops, scoring_flops, vision_flops
from duet_vlm.profiling.kv import kv_bytes, kv_bytes_per_layer, state_bytes
from duet_vlm.profiling.model_dims import DecoderDims, VisionDims, decoder_dims
from duet_vlm.reducers.inputs import Input

WITHIN = 0.01
ROW: Row = (1, 5, Picture(1, 5, 7), *range(20, 34))  # windows at two borders are not full
METHODS = [None, *REDUCING]


def test_the_counter_counts_products_and_whole_rectangles() -> None:
    a, b = torch.randn(5, 7), torch.randn(7, 11)
    q, kv = torch.randn(2, 4, 9, 16), torch.randn(2, 4, 13, 16)
    conv = nn.Conv2d(3, 8, 4, stride=4)
    assert count_flops(lambda: a @ b) == 2 * 5 * 7 * 11
    assert count_flops(lambda: conv(torch.randn(1, 3, 16, 16))) == 2 * 16 * 48 * 8
    assert count_flops(lambda: F.scaled_dot_product_attention(q, kv, kv)) == 4 * 2 * 4 * 9 * 13 * 16
    # nothing taken off
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True)) == 4 * 2 * 4 * 9 * 9 * 16


@pairs(METHODS, parts=1)
def test_a_prompt_costs_what_was_predicted(family: str, method: str | None) -> None:
    """From pixels to the first token: tower, signals, choice, projector, every layer at its own length, ranking, head."""
    model, inputs = shared(family), FAMILIES[family].inputs([ROW])
    with torch.no_grad(), duet_vlm.attach(model, method or "none", **REDUCING.get(method, {})) as handle:
        counted = count_flops(lambda: model(**inputs, logits_to_keep=1))
        report = handle.report()
    assert report.predicted.flops == pytest.approx(counted, rel=WITHIN)
    assert report.observed.flops == pytest.approx(counted, rel=WITHIN)
    if method is None:
        assert report.full.flops == pytest.approx(counted, rel=WITHIN)
    elif not {Input.GRADIENT, Input.QUESTION_STATE, Input.PROJECTOR} & handle.reducer.requires:
        # a gradient costs three layers a stage, and these decoders have eight; with the question read alone, or a
        # projector that is asked again and again, there is little left to save
        assert counted < 0.95 * report.full.flops


@pytest.mark.parametrize("decoder", ["llava", "qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("pio", {"budget": 0.5}), ("pio", {"schedule": ((2, 0.6), (4, 0.3), (6, 0.1))}),
        ("pio", {"schedule": ((2, 0.6), (5, 0.3), (6, 0.1)), "probe": "last"}), ("fitprune", {"schedule": ((2, 0.8), (3, 0.6), (4, 0.5), (6, 0.1))}),
        ("fitprune", {"schedule": ((3, 0.8), (6, 0.5), (7, 0.1))}), ("fastv", {"layers": 4, "keep": 0.3}),
        ("fitprune", {"schedule": tuple(enumerate((0.6, 0.3, 0.2, 0.15, 0.12, 0.1), 2))}),
    ],
    ids=str,
)  # fmt: skip
def test_layers_that_rank_for_several_drops_cost_what_was_predicted(
    decoder: str, method: str, settings: dict[str, Any]
) -> None:
    """Where layers have a state, the next one with attention probes, and the last one ranks for all drops up to the
    next; a layer that ranks for later drops does so without the rows that its own has dropped."""
    model, inputs = shared(decoder), FAMILIES[decoder].inputs([(1, 5, Picture(1, 12, 14), *range(20, 34))])
    with torch.no_grad(), duet_vlm.attach(model, method, **settings) as handle:
        counted = count_flops(lambda: model(**inputs, logits_to_keep=1))
        report = handle.report()
    assert report.predicted.flops == pytest.approx(counted, rel=0.003)
    assert report.observed.flops == pytest.approx(counted, rel=0.003)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.video])
@pytest.mark.parametrize("method", ["duet", "fastv"])
def test_a_clip_costs_what_was_predicted(family: str, method: str) -> None:
    model, inputs = build(family), FAMILIES[family].inputs(clips_for(family)[:1])
    with torch.no_grad(), duet_vlm.attach(model, method, **REDUCING[method]) as handle:
        counted = count_flops(lambda: model(**inputs, logits_to_keep=1))
        report = handle.report()
    assert report.observed.flops == pytest.approx(counted, rel=WITHIN)
    assert report.full.flops == pytest.approx(count_flops(lambda: model(**inputs, logits_to_keep=1)), rel=WITHIN)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "llava_next", "llava_onevision"])
@pytest.mark.parametrize("method", ["zoo_prune", "quecc", "duet", "evs"])
@pytest.mark.parametrize("clip", [False, True], ids=["images", "and a clip"])
def test_several_pictures_cost_what_was_predicted(family: str, method: str, clip: bool) -> None:
    """Images and clips are chosen from in calls of their own; a projector that a method asks is not given padding."""
    row = (1, Picture(1, 6, 4), 5, Picture(2, 2, 2), 6, 7, *([Picture(3, 3, 4, frames=4), 8, 9] if clip else []))
    mixes = FAMILIES[family].video and FAMILIES[family].mixes
    if clip and not mixes:
        return
    model, inputs = shared(family), FAMILIES[family].inputs([row])
    with torch.no_grad(), duet_vlm.attach(model, method, **REDUCING[method]) as handle:
        counted = count_flops(lambda: model(**inputs, logits_to_keep=1))
        assert handle.report().observed.flops == pytest.approx(counted, rel=WITHIN)


@pytest.mark.parametrize("method", ["none", "duet", "fastv", "scope"])
def test_the_embedded_model(method: str) -> None:
    model, processor = tiny.load()
    item = tiny.samples("test", 1)[0]
    inputs = processor(images=item.image, text=tiny.prompt(item.question), return_tensors="pt")
    with torch.no_grad(), duet_vlm.attach(model, method, **({} if method == "none" else {"budget": 0.22})) as handle:
        counted = count_flops(lambda: model(**inputs, logits_to_keep=1))
        assert handle.report().observed.flops == pytest.approx(counted, rel=WITHIN)


@contextmanager
def count_rows(layers: Iterable[nn.Module]) -> Iterator[list[list[int]]]:
    """Per layer, the rows [B x T] of each of its calls, taken from the tensors that it was really given (hooks of a
    handle run first)."""
    calls: list[list[int]] = []
    hooks = []
    for layer in layers:
        calls.append([])

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any], seen: list[int] = calls[-1]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen.append(hidden.shape[:-1].numel())

        hooks.append(layer.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_that_the_layers_were_given(family: str) -> None:
    model, inputs = build(family), FAMILIES[family].inputs([ROW])
    layers = adapter_for(model).layers
    with torch.no_grad(), duet_vlm.attach(model, "duet", **REDUCING["duet"]) as handle, count_rows(layers) as calls:
        cache = model(**inputs, use_cache=True).past_key_values
        report, shape = handle.report(), handle.adapter.decoder_dims()
        text = report.tokens - sum(plan.tokens for plan in [handle.plan(report.tokens)])
    rows = [seen for (seen,) in calls]
    text = rows[0] - int(report.measured[0])
    assert rows == [text + int(count) for count in report.measured]
    assert kv_bytes(shape, rows, 4) == report.observed.kv_bytes == cache_bytes(cache)[0]


# ---- decoders alone: no adapter, no tower

COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
    "vocab_size": 100, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 40, "num_experts_per_tok": 3}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 4, 4], "rope_theta": 1e4}}
HALF = {
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [2, 2, 2],
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
    }
}
DECODERS: dict[str, tuple[Any, Any]] = {
    "plain": (LlamaModel, LlamaConfig(**COMMON)),
    "all layers windowed": (MistralModel, MistralConfig(**COMMON, sliding_window=32)),
    "windows and full layers": (
        Gemma3TextModel, Gemma3TextConfig(**COMMON, sliding_window=32, layer_types=["sliding_attention"] * 3 + ["full_attention"]),
    ),
    "linear and full layers": (Qwen3_5TextModel, Qwen3_5TextConfig(**COMMON, **LINEAR)),
    "linear layers and experts": (
        Qwen3_5MoeTextModel, Qwen3_5MoeTextConfig(**COMMON, **LINEAR, **EXPERTS, num_experts=8, shared_expert_intermediate_size=56),
    ),
    "experts": (Qwen3VLMoeTextModel, Qwen3VLMoeTextConfig(**COMMON, **MROPE, **EXPERTS, num_experts=8, mlp_only_layers=[1])),
    "experts but for the first layer, a shared one": (
        Glm4vMoeTextModel, Glm4vMoeTextConfig(**COMMON, **HALF, **EXPERTS, n_routed_experts=8, n_shared_experts=2, first_k_dense_replace=1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("rows", [20, 150])
def test_decoders_of_every_kind(name: str, rows: int) -> None:
    """Prefill, then one step on the cache; and what the cache holds."""
    kind, config = DECODERS[name]
    torch.manual_seed(0)
    model = kind(config).eval()
    model.set_attn_implementation("sdpa")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    shape = decoder_dims(config)
    outputs: list[Any] = []
    embeds = torch.randn(1, rows, config.hidden_size)
    with torch.no_grad():
        prefill = count_flops(lambda: outputs.append(model(inputs_embeds=embeds, use_cache=True)))
        cache = outputs[0].past_key_values
        held = cache_bytes(cache)
        step = count_flops(lambda: model(inputs_embeds=embeds[:, :1], past_key_values=cache, use_cache=True))
    head = 2 * config.hidden_size * config.vocab_size
    assert prefill_flops(shape, [rows] * 4) - head == pytest.approx(prefill, rel=WITHIN)
    one = sum(decoder_layer_flops(shape, 1, shape.seen(rows + 1, layer), layer) for layer in range(4))
    assert one == pytest.approx(step, rel=0.03 if shape.linear else WITHIN)
    assert held == (kv_bytes(shape, [rows] * 4, 4), state_bytes(shape, 4))


def test_layer_kinds_are_read_from_the_config() -> None:
    shapes = {name: decoder_dims(config) for name, (_, config) in DECODERS.items()}
    assert shapes["plain"].kinds == () and shapes["plain"].experts is None
    assert shapes["all layers windowed"].kinds == ("sliding",) * 4
    assert (
        shapes["linear and full layers"].kinds == ("linear", "linear", "linear", "full")
        and shapes["linear and full layers"].gated
    )
    assert shapes["experts"].routed == (True, False, True, True)
    assert shapes["experts but for the first layer, a shared one"].experts.shared == 80  # type: ignore[union-attr]
    config = LlamaConfig(**COMMON)
    config.layer_types = ["full_attention", "mamba", "full_attention", "mamba"]
    with pytest.raises(ValueError, match="mamba"):
        decoder_dims(config)


def test_what_a_window_leaves_in_the_cache() -> None:
    shape = DecoderDims(3, 64, 4, 2, 16, 96, 100, kinds=("full", "sliding", "linear"), window=10)
    assert kv_bytes_per_layer(shape, (30, 30, 30), 2) == (2 * 30 * 32 * 2, 2 * 9 * 32 * 2, 0)
    assert kv_bytes_per_layer(shape, (5, 5, 5), 2) == (2 * 5 * 32 * 2, 2 * 5 * 32 * 2, 0)


def test_windows_at_the_border_are_not_full() -> None:
    """5 x 7 tokens of four patches in windows of 4 x 4 tokens: 4x4, 4x3, 1x4 and 1x3 of them."""
    tower = VisionDims(2, 32, 48, 3, 4, 0, 96, (), full_layers=1, window=64)
    pairs = sum((4 * n) ** 2 for n in (16, 12, 4, 3))
    without = VisionDims(2, 32, 48, 3, 4, 0, 96, (), full_layers=2)
    assert vision_flops(without, 35) - vision_flops(tower, 35, (5, 7)) == 4 * 32 * (140**2 - pairs)


def test_ranking_by_hand() -> None:
    shape = DecoderDims(2, 64, 4, 2, 16, 96, 100)
    assert scoring_flops(shape, 50, 3) == 2 * 50 * 64 * 32 + 2 * 3 * 64 * 64 + 2 * 3 * 50 * 64
