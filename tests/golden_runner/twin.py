"""Slow twins for Qwen2.5-VL: ranking written as loops in float64, and the released code's drop with its documented
defect."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[n, heads, d] with half-split rotary tables [n, d]."""
    half = x.shape[-1] // 2
    swapped = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos[:, None] + swapped * sin[:, None]


def ranking_scores(
    layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], queries: list[int], tokens: list[int]
) -> Tensor:
    """Attention (no causal mask) that the rows ``queries`` pay to the rows ``tokens``: mean over heads, then over
    queries.

    ``hidden`` [T, D] enters ``layer``; one query and one head at a time.
    """
    attention = layer.self_attn
    x = layer.input_layernorm(hidden)
    cos, sin = (t.double() for t in rotary)
    query, key = (
        rotated(p(x).view(len(x), -1, attention.head_dim).double(), cos, sin)
        for p in (attention.q_proj, attention.k_proj)
    )
    share = query.shape[1] // key.shape[1]
    total = torch.zeros(len(x), dtype=torch.float64)
    for row in queries:
        for head in range(query.shape[1]):
            total += (key[:, head // share] @ query[row, head] / math.sqrt(attention.head_dim)).softmax(0)
    return (total / (query.shape[1] * len(queries)))[tokens].float()


def best(scores: Tensor, count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:count])


class OfficialDrop:
    """The released Qwen2.5-VL drop on a model without T2V, its defect included.

    After each stage the code overwrites its image token count by the number kept, but goes on to multiply it by ratios
    that are meant for the count at the input. A later stage therefore ranks only the first int(kept * previous ratio)
    image rows; the others stay for good and count as text queries. Install it behind the library's hooks; ``undo()``
    takes it off.
    """

    def __init__(self, text_model: nn.Module, layers: list[int], ratios: list[float], start: int, tokens: int) -> None:
        self.layers, self.ratios, self.start, self.tokens = layers, [1.0, *ratios], start, tokens
        self.rows: list[int] = []
        self.scores: dict[int, Tensor] = {}
        self.kept: dict[int, list[int]] = {}
        self.blocks: list[int] = []
        self.left: list[int] = []
        self.hooks = [
            layer.register_forward_pre_hook(self._hook(index), with_kwargs=True)
            for index, layer in enumerate(text_model.layers)
            if index >= min(layers)
        ]

    def undo(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _hook(self, index: int) -> Any:
        def at_layer(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if hidden.shape[1] == 1:  # decoding: the plain forward on shortened caches, one query sees every key
                return (hidden,), kwargs | {"attention_mask": None}
            table = kwargs["position_embeddings"]
            if index == min(self.layers):
                self.rows, self.count, self.blocks, self.left = list(range(hidden.shape[1])), self.tokens, [], []
            if index in self.layers:
                stage = self.layers.index(index)
                hidden = hidden[:, self._drop(stage, layer, hidden[0], tuple(t[0, self.rows] for t in table))]
            width = len(self.rows)
            mask = torch.full((width, width), torch.finfo(hidden.dtype).min).triu(1)[None, None]
            return (hidden,), kwargs | {
                "attention_mask": mask,
                "position_embeddings": tuple(t[:, self.rows] for t in table),
            }

        return at_layer

    def _drop(self, stage: int, layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, ...]) -> list[int]:
        block, keep = int(self.count * self.ratios[stage]), int(self.count * self.ratios[stage + 1])
        end = self.start + block
        self.scores[stage] = ranking_scores(
            layer, hidden, rotary, list(range(end, len(hidden))), list(range(self.start, end))
        )
        self.kept[stage] = best(self.scores[stage], keep)
        self.blocks.append(block)
        self.left.append(keep)
        self.count = keep
        stay = [*range(self.start), *(self.start + i for i in self.kept[stage]), *range(end, len(hidden))]
        self.rows = [self.rows[i] for i in stay]
        return stay
