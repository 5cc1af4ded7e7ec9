"""Facts about transformers that runtime/compat.py leans on. One that changes shall fail here, by name, and not as a
wrong token somewhere."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXED, ONE, build, forward, generate, shared
from method_matrix import REDUCING
from torch import nn
from transformers import DynamicCache, GenerationMixin, QuantizedCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, QuantizedLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import duet_vlm
from duet_vlm.models.adapter import FULL
from duet_vlm.models.lookup import adapter_for
from duet_vlm.runtime import compat

FILLED = (3, 5, 2, 2, 2, 2, 2, 2)  # rows in the cache of each layer


def uneven_cache(config: Any) -> DynamicCache:
    cache = DynamicCache(config=config)
    for layer, rows in enumerate(FILLED):
        cache.update(torch.zeros(1, 4, rows, 16), torch.zeros(1, 4, rows, 16), layer)
    return cache


def test_an_older_transformers_is_named_before_anything_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, works in (("5.19.0", False), ("4.57.1", False), ("5.21.0.dev0", True), ("5.100", True), ("6.0", True)):
        monkeypatch.setattr(compat.transformers, "__version__", there)
        if works:
            compat.check_version()
            continue
        with pytest.raises(ImportError, match=rf"needs transformers >= 5.21, and here is {there}.*duet-vlm serve"):
            duet_vlm.attach(shared("llava"), "duet", budget=4)


def test_masks_are_sized_by_layer() -> None:
    assert "layer_idx" in inspect.signature(create_causal_mask).parameters
    config = shared("llava", "eager").model.language_model.config
    for layer, rows in enumerate(FILLED):
        mask = compat.decoder_mask(config, torch.zeros(1, 2, 64), None, uneven_cache(config), layer)
        assert mask.shape[-2:] == (2, rows + 2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("new", [1, 4])
def test_our_padded_masks_are_the_stock_masks(attention: str, new: int) -> None:
    """Where a query sees anything; rows of padding see nothing and are never read."""
    config = shared("llava", attention).model.language_model.config
    cache = uneven_cache(config)
    padding = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1][: FILLED[1] + new]])
    hidden = torch.zeros(1, new, 64)
    stock = create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=padding,
        past_key_values=cache,
        position_ids=None,
        layer_idx=1,
    )
    assert torch.equal(compat.decoder_mask(config, hidden, padding, cache, 1), stock)


def test_gaps_in_positions_are_read_as_packed_sequences() -> None:
    """The reason why positions are never handed to the mask builder and why prompts without a cache get an explicit
    mask."""
    config = shared("llava", "eager").model.language_model.config
    hidden, gaps = torch.zeros(1, 4, 64), torch.tensor([[0, 1, 5, 6]])
    packed = create_causal_mask(
        config=config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=gaps
    )
    explicit = create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=torch.ones(1, 4).long(),
        past_key_values=None,
        position_ids=gaps,
    )
    assert packed[0, 0, 3, 0] != 0 and explicit[0, 0, 3, 0] == 0


def test_caches_take_layers_of_different_lengths() -> None:
    config = shared("llava").model.language_model.config
    cache = uneven_cache(config)
    assert tuple(cache.get_seq_length(layer) for layer in range(8)) == FILLED
    assert compat.cache_bytes(cache) == tuple(2 * 4 * rows * 16 * 4 for rows in FILLED)
    cache.crop(-2)  # relative, so that every layer loses its own last rows
    assert tuple(cache.get_seq_length(layer) for layer in range(8)) == tuple(rows - 2 for rows in FILLED)


class InTwoFours(QuantizedLayer):
    """Two numbers in a byte, and a float16 scale for each row of 16: what the group-wise backends store, without one of
    them."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> tuple[torch.Tensor, dict[str, Any]]:
        scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-6).half()
        whole = (tensor / scale * 7 + 8).round().clamp(0, 15).to(torch.uint8)
        return whole[..., ::2] * 16 + whole[..., 1::2], {"scale": scale, "nbits": 4, "shape": tensor.shape}

    def _dequantize(self, packed: tuple[torch.Tensor, dict[str, Any]]) -> torch.Tensor:
        values, meta = packed
        return (torch.stack([values // 16, values % 16], -1).flatten(-2).float() - 8) / 7 * meta["scale"]


def test_bytes_of_a_quantised_cache_are_those_that_it_stores() -> None:
    cache = Cache(layers=[InTwoFours(q_group_size=16, residual_length=4) for _ in range(2)])
    cache.update(torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16), 0)
    packed = 2 * (2 * 3 * 5) * (16 // 2 + 2)  # keys and values; per row 8 bytes of numbers and 2 of scale
    assert compat.cache_bytes(cache) == (packed, 0)
    cache.update(torch.randn(2, 3, 1, 16), torch.randn(2, 3, 1, 16), 0)
    assert compat.cache_bytes(cache) == (packed + 2 * 2 * 3 * 16 * 4, 0)  # and a row in float32 that waits to be packed


class InOneTensor(torch.Tensor):
    """States another size than it stores, as packed tensors do."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None


def test_bytes_of_packed_tensors_are_those_of_their_parts() -> None:
    class ClipPacking(InTwoFours):
        def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
            packed = tensor.as_subclass(InOneTensor)
            packed.inner = torch.zeros(7, dtype=torch.uint8)
            return packed

    cache = Cache(layers=[ClipPacking()])
    cache.update(torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16), 0)
    assert compat.cache_bytes(cache) == (14,)


def test_bytes_of_a_cache_that_stores_rows_elsewhere_are_unknown_not_zero() -> None:
    class Elsewhere(DynamicLayer):
        def get_seq_length(self) -> int:
            return 5

    assert compat.cache_bytes(Cache(layers=[Elsewhere()])) is None
    assert compat.cache_bytes(Cache(layers=[DynamicLayer()])) == (0,)


@pytest.mark.parametrize(("backend", "module"), [("fp8", "torch"), ("quanto", "optimum.quanto"), ("hqq", "hqq")])
def test_bytes_of_the_backends_that_are_installed(backend: str, module: str) -> None:
    """A prompt of 40 rows, 4 heads of 16: eight bits each and one scale; four bits each and a scale and a zero for
    every group of 16."""
    pytest.importorskip(module)
    options = {} if backend == "fp8" else {"nbits": 4, "q_group_size": 16, "axis_key": 0 if backend == "quanto" else 1}
    cache = QuantizedCache(backend=backend, config=shared("llava").config, **options)
    rows = 40 * 4
    cache.update(torch.randn(1, 4, 40, 16), torch.randn(1, 4, 40, 16), 0)
    groups = 0 if backend == "fp8" else rows * 2 * 4
    expected = 2 * (rows * 16 + 4) if backend == "fp8" else 2 * (rows * 8 + groups)
    assert compat.cache_bytes(cache)[:2] == (expected, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_reports_count_what_a_quantised_cache_stores(family: str) -> None:
    """A row of d numbers takes d / 2 + 2 bytes where it took 4 d; stock refuses decoders with other layers than full
    attention by name."""
    model, inputs = shared(family), FAMILIES[family].inputs(MIXED)
    adapter = adapter_for(model)
    if set(adapter.layer_types) != {FULL}:
        with pytest.raises(ValueError, match="only supported for models with only full attention layers"):
            QuantizedCache(backend="fp8", config=model.config)
        return
    size = adapter.decoder_dims().head_dim
    with duet_vlm.attach(model, "duet", **REDUCING["duet"]) as handle:
        generate(model, inputs, 3)
        plain = handle.report().observed.kv_bytes
        generate(model, inputs, 3, past_key_values=Cache(layers=[InTwoFours(q_group_size=16) for _ in range(8)]))
        assert handle.report().observed.kv_bytes * 4 * size == plain * (size // 2 + 2)


def test_static_caches_are_told_apart() -> None:
    config = shared("llava").model.language_model.config
    assert compat.is_static(StaticCache(config=config, max_cache_len=8))
    assert not compat.is_static(DynamicCache(config=config)) and not compat.is_static(None)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_hooks_under_checkpoints(family: str, reentrant: bool) -> None:
    """Once, or (older versions) again when the backward pass recomputes the layer: decisions are replayed either way."""
    model, calls, runs = build(family).train(), [], []
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    layer = FAMILIES[family].text(model).layers[3]
    layer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(1), with_kwargs=True)
    layer.mlp.register_forward_pre_hook(lambda module, args: runs.append(1))
    inputs = FAMILIES[family].inputs(MIXED)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert len(runs) == 2 and len(calls) in (1, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_called_by_keyword_with_rows_first(family: str) -> None:
    model, seen = shared(family), []
    layer = FAMILIES[family].text(model).layers[3]
    hook = layer.register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True)
    forward(model, FAMILIES[family].inputs(MIXED))
    hook.remove()
    args, kwargs = seen[0]
    assert len(args) == 1 and args[0].ndim == 3
    assert {"attention_mask", "position_embeddings", "position_ids", "past_key_values"} <= set(kwargs)
    cos, sin = kwargs["position_embeddings"]
    # M-RoPE tables arrive mixed
    assert cos.shape == sin.shape and cos.shape[-2:] == (args[0].shape[1], FAMILIES[family].turned)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_encodes_first_and_hands_the_output_on(family: str) -> None:
    """The same object reaches every later step without a cache, so decisions can ride on it."""
    model, seen = build(family), []
    model.register_forward_pre_hook(
        lambda m, a, k: seen.append((k.get("mm_encoder_outputs") or {}).get("image")), with_kwargs=True
    )
    generate(model, FAMILIES[family].inputs([ONE]), 3, use_cache=False)
    assert len(seen) == 3 and seen[0] is not None and all(output is seen[0] for output in seen)
    assert all(isinstance(rows, torch.Tensor) for rows in seen[0].pooler_output)


def test_the_prefill_step_has_the_generation_config() -> None:
    assert list(inspect.signature(getattr(GenerationMixin, compat.PREFILL)).parameters)[1:4] == [
        "input_ids",
        "generation_config",
        "model_kwargs",
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_setter_keeps_one_instance_attribute(family: str) -> None:
    model = build(family)
    before = set(vars(model))
    model.loss_function = model.loss_function
    assert set(vars(model)) - before == {"_loss_function"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_modules_call_the_function_their_config_names(family: str, attention: str) -> None:
    model = shared(family, attention)
    tower = FAMILIES[family].attention(FAMILIES[family].blocks(model)[0])
    function = compat.attention_function(tower, attention)
    assert callable(function) and tower.config._attn_implementation == attention
    assert (function is ALL_ATTENTION_FUNCTIONS["sdpa"]) == (attention == "sdpa")


def test_hooks_that_are_always_called_run_after_errors() -> None:
    class Bad(nn.Module):
        def forward(self) -> None:
            raise KeyError

    module, ran = Bad(), []
    module.register_forward_hook(lambda *args: ran.append(1), always_call=True)
    with pytest.raises(KeyError):
        module()
    assert ran == [1]


def test_finite() -> None:
    assert bool(compat.finite(torch.ones(3, 3))) and bool(compat.finite(torch.full((9,), 60000.0, dtype=torch.float16)))
    for bad in (float("nan"), float("inf"), float("-inf")):
        assert not bool(compat.finite(torch.tensor([1.0, bad])))
