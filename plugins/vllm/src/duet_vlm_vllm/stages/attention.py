"""Attention of a later stage: vLLM's backend, told other rows, lengths and slots than those that the runner counted."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, subclass_attention_backend_with_overrides
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_interface import get_kv_quant_mode

from duet_vlm.ops.ragged import upload
from duet_vlm.serve.staged_step import StagedStep
from duet_vlm_vllm.stages.kv_cache import StageSpec
from duet_vlm_vllm.stages.running_step import RunningStep


@functools.lru_cache
def staged_backend(backend: type, stage: int) -> type:
    """``backend`` for the layers of a stage; one class for each, as vLLM gives layers of one class one builder of
    tables.

    Builder and implementation are both wrapped, as vLLM does for cross-attention: keys are written to the slots of the
    forward context, which the runner counted from places in the whole prompt, so the implementation writes them itself.
    """

    class StageBuilder(backend.get_builder_cls()):  # type: ignore[misc]
        supports_update_block_table = False  # groups of one stage would share the first one's slots

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
            return AttentionCGSupport.NEVER

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            layer = self.vllm_config.compilation_config.static_forward_context[self.layer_names[0]]
            step = layer.running.step
            if step is not None and step.visual:
                common_attn_metadata = stage_metadata(step, stage, common_attn_metadata, self.kv_cache_spec.block_size)
            return super().build(common_prefix_len, common_attn_metadata, fast_build)

    class StageImpl(backend.get_impl_cls()):  # type: ignore[misc]
        def forward(
            self,
            layer: Any,
            query: Any,
            key: Any,
            value: Any,
            kv_cache: Any,
            attn_metadata: Any,
            *more: Any,
            **named: Any,
        ) -> Any:
            if attn_metadata is not None and not backend.forward_includes_kv_cache_update:
                self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, *more, **named)

    overrides = {
        "get_builder_cls": staticmethod(lambda: StageBuilder),
        "get_impl_cls": staticmethod(lambda: StageImpl),
        "forward_includes_kv_cache_update": True,
    }
    return subclass_attention_backend_with_overrides(f"DuetStage{stage}_", backend, overrides)


def stage_metadata(step: StagedStep, stage: int, common: Any, block_size: int) -> Any:
    """The tables of a stage in place of the runner's: rows that are there, shorter sequences, slots counted in rows
    that are left."""
    device = common.seq_lens.device
    starts, lengths = (torch.from_numpy(table).int() for table in (step.query_starts(stage), step.seq_lens(stage)))
    return replace(
        common,
        query_start_loc=upload(starts, device),
        query_start_loc_cpu=starts,
        seq_lens=upload(lengths, device),
        seq_lens_cpu_upper_bound=lengths,
        num_actual_tokens=int(starts[-1]),
        max_query_len=int(step.num_rows[stage].max()),
        max_seq_len=int(lengths.max()),
        slot_mapping=step.slots(stage, common.block_table_tensor, block_size),
        positions=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


class StageAttention(Attention):
    """Attention of a layer of a later stage, in the place of the one that vLLM made (``layer``)."""

    def __init__(self, layer: Attention, stage: int, running: RunningStep, vllm_config: Any) -> None:
        cache = vllm_config.cache_config
        backend = get_attn_backend(layer.head_size, torch.get_default_dtype(), cache.cache_dtype)
        super().__init__(
            layer.num_heads,
            layer.head_size,
            layer.impl.scale,
            num_kv_heads=layer.num_kv_heads,
            cache_config=cache,
            quant_config=layer.quant_config,
            prefix=layer.layer_name,
            attn_backend=staged_backend(backend, stage),
        )
        self.stage, self.running = stage, running

    def get_kv_cache_spec(self, vllm_config: Any) -> StageSpec:
        return StageSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            head_size_v=self.head_size_v,
            dtype=self.kv_cache_torch_dtype,
            kv_quant_mode=get_kv_quant_mode(self.kv_cache_dtype),
            stage=self.stage,
        )


def keys_can_be_read(layer: Attention, vllm_config: Any) -> bool:
    """True where the cache of a layer is not packed for a kernel: only that of vLLM's CPU backend for vectors is read."""
    cache = vllm_config.cache_config
    return current_platform.is_cpu() and "vec" == _get_attn_isa(
        vllm_config.model_config.dtype, cache.block_size, layer.head_size, cache.cache_dtype
    )


def cached_keys(layer: Attention, blocks: Tensor, count: int) -> Tensor:
    """The first ``count`` keys [Hkv, count, d] that a request with these ``blocks`` [M] has in the cache of a layer,
    where they can be read: a block holds them as [d, block], and values behind them."""
    total, heads, size, _ = layer.kv_cache.shape
    keys = layer.kv_cache.view(total, heads, 2 * size, layer.head_size)[:, :, :size]
    keys = keys[blocks[: -(-count // size)].long()].reshape(-1, heads, layer.head_size, size)
    return keys.permute(1, 0, 3, 2).reshape(heads, -1, layer.head_size)[:, :count]
