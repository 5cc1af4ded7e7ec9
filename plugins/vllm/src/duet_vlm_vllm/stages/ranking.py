"""Signals of one decoder layer for the rows that may leave: queries, keys and hidden states, made with vLLM's modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context

from duet_vlm.ops.ragged import upload
from duet_vlm.reducers.decoder import DecoderReducer
from duet_vlm.reducers.inputs import Input
from duet_vlm.serve.stage_choice import DropTables, Prefix, attention_scores
from duet_vlm.serve.staged_step import StagedStep
from duet_vlm_vllm.stages.attention import cached_keys

PROJECTION = ("qkv_proj", "rotary_emb", "attn", "q_size", "kv_size", "head_dim")  # of an attention module that ranks


def layer_signals(
    reducer: DecoderReducer,
    layer: nn.Module,
    hidden: Tensor,
    positions: Tensor,
    tables: DropTables,
    step: StagedStep,
    requests: Any,
) -> dict[str, Tensor]:
    """Attention scores and keys of ``layer`` for the rows of ``tables`` [D, L, ...], as far as the method asks for
    them.

    ``hidden`` [T, D] are the layer's inputs with their residual, ``positions`` [..., T] theirs; ``requests`` [D] the
    numbers of the requests.
    """
    if not reducer.uses_attention():
        return {}
    attention, (batch, width) = layer.self_attn, tables.rows.shape
    rows = tables.rows.flatten()
    query, key = query_key(attention, layer.input_layernorm(hidden[rows]), positions[..., rows])
    query, key = (x.view(batch, width, -1, attention.head_dim).transpose(1, 2) for x in (query, key))
    made = {}
    if Input.SCORES in reducer.requires:
        scores = attention_scores(
            reducer, query, key, attention.attn.impl.scale, tables, _prefix(attention.attn, step, requests)
        )
        made["scores"] = _of_all_ranks(scores)
    if Input.DECODER_KEYS in reducer.requires:
        made["keys"] = key.transpose(1, 2).flatten(2)
    return made


def query_key(attention: Any, normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated queries [T, H d] and keys [T, Hkv d] of normed rows [T, D]."""
    qkv, _ = attention.qkv_proj(normed)
    query, key, _ = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
    if hasattr(attention, "q_norm"):  # Qwen3: of each head
        query, key = (
            norm(rows.unflatten(1, (-1, attention.head_dim))).flatten(1)
            for norm, rows in ((attention.q_norm, query), (attention.k_norm, key))
        )
    return attention.rotary_emb(positions, query.contiguous(), key.contiguous())  # type: ignore[no-any-return]


def _prefix(layer: Any, step: StagedStep, requests: Any) -> Prefix | None:
    """Keys of rows in front of the images that the prefix cache had [D, Hkv, P, d], and which are real [D, P]; None
    where there are none."""
    counts = [int(step.computed[number]) for number in requests]
    if not any(counts):
        return None
    blocks = get_forward_context().attn_metadata[layer.layer_name].block_table
    keys = [cached_keys(layer, blocks[number], count) for number, count in zip(requests, counts, strict=True)]
    padded = [nn.functional.pad(one, (0, 0, 0, max(counts) - one.shape[1])) for one in keys]
    device = keys[0].device
    return torch.stack(padded), torch.arange(max(counts), device=device) < upload(counts, device)[:, None]


def _of_all_ranks(scores: Tensor) -> Tensor:
    """Each rank has some heads, and all must choose alike: means are averaged, heads put side by side."""
    ranks = get_tensor_model_parallel_world_size()
    if ranks == 1:
        return scores
    scores = (
        scores.contiguous()
    )  # behind a cached prefix they are a part of more, which vLLM's CPU ranks add up in the wrong order
    return (
        tensor_model_parallel_all_gather(scores)
        if scores.ndim == 3
        else tensor_model_parallel_all_reduce(scores) / ranks
    )
