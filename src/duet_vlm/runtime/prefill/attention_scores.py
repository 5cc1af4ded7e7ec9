"""What ranks visual tokens inside the decoder: attention of chosen rows, and keys, of one layer, made for the rows that are there."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import Adapter, Rotary
from duet_vlm.ops.ragged import gather_rows, last_true, pack_right, upload
from duet_vlm.ops.score import QUERY_BLOCK, query_attention, state_read_out
from duet_vlm.planning.tokens import TokenMap
from duet_vlm.reducers.decoder import DecoderReducer
from duet_vlm.reducers.inputs import Input
from duet_vlm.runtime import compat

LEAST = 0.01  # of the product of two rows of ones at one place: positions never divide attention by less

Signals = dict[str, Tensor]  # each [B, T, ...], a row for every row of the sequence


class TextAttentionScorer:
    """The signals of one prompt. ``queries`` [B, S] bool are its text queries by slot, ``asking`` how many each sample has; ``prepared`` is the
    4-D mask of full attention, where there is one."""

    def __init__(self, reducer: DecoderReducer, adapter: Adapter, queries: Tensor, asking: list[int], prepared: Tensor | None) -> None:
        self.reducer, self.adapter = reducer, adapter
        self.queries, self.num_queries, self.prepared_masks = queries, asking, prepared
        self.raters: Tensor | None = None  # [B, S] bool by slot

    def text_rows(self, tokens: TokenMap) -> tuple[Tensor, Tensor]:
        """The text queries among the current rows: [B, Q] rows and which of them are real."""
        index, valid = pack_right(self._query_rows(tokens), max(1, *self.num_queries))
        if self.raters is not None:
            valid = valid & self.raters.to(valid.device).gather(1, tokens.prompt_index.gather(1, index))
        return index, valid

    def choose_raters(self, embeds: Tensor, tokens: TokenMap) -> None:
        """Raters: of the text queries those that the visual rows of ``embeds`` [B, T, D] resemble more than the average query."""
        index, valid = self.text_rows(tokens)
        places, visual = pack_right(tokens.visual, tokens.visual.shape[1])
        text = gather_rows(embeds, index).float().transpose(1, 2)
        share = text.new_zeros(valid.shape)
        with compat.without_autocast(embeds):
            for rows, real in zip(places.split(QUERY_BLOCK, 1), visual.split(QUERY_BLOCK, 1), strict=True):
                likeness = (gather_rows(embeds, rows).float() @ text).masked_fill(~valid[:, None], float("-inf")).softmax(-1)
                share += (likeness * real[..., None]).sum(1)
        mean = (share * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True)
        rates = valid & (share > mean)
        rates = torch.where(rates.any(1, keepdim=True), rates, valid)  # all alike, or nothing to resemble
        self.raters = torch.zeros_like(self.queries, device=rates.device).scatter(1, tokens.prompt_index.gather(1, index), rates)

    def signals(
        self, layer: nn.Module, hidden: Tensor, tokens: TokenMap, rotary: Rotary, visual_rows: int, state: bool = False
    ) -> Signals:
        """What the method asks of ``layer`` for its rows ``hidden`` [B, T, D], of which a sample has up to ``visual_rows`` visual ones; ``state``: it
        has no attention."""
        reducer, device = self.reducer, layer_device(layer, hidden)
        if state:
            return {"scores": self._read_out(layer, hidden.to(device), tokens.to(device))}
        index, valid = (x.to(device) for x in self.text_rows(tokens))
        hidden, rotary, tokens = hidden.to(device), (rotary[0].to(device), rotary[1].to(device)), tokens.to(device)
        visual, there = pack_right(tokens.visual, max(1, visual_rows)) if Input.VISUAL_SELF_ATTENTION in reducer.requires else (index[:, :0], valid[:, :0])
        with compat.uncached_autocast(hidden):
            query, key = self.adapter.project(layer, hidden, rotary, torch.cat([index, visual], 1))
        with compat.without_autocast(hidden):
            text, own = query.tensor_split((index.shape[1],), 2)
            received = functools.partial(self._received, layer, key, tokens, rotary)
            made: Signals = {}
            if Input.SCORES in reducer.requires:
                made["scores"] = received(text, index, valid)
            if Input.VISUAL_SELF_ATTENTION in reducer.requires:
                made["visual_self_attention"] = received(own, visual, there)
            if Input.DECODER_KEYS in reducer.requires:
                made["keys"] = key.transpose(1, 2).flatten(2)
        return made

    def _read_out(self, layer: nn.Module, hidden: Tensor, tokens: TokenMap) -> Tensor:
        """What text reads of every row out of the state of ``layer``: [B, T] float32."""
        index, valid = self.text_rows(tokens)
        with compat.uncached_autocast(hidden):
            query, key, gate = self.adapter.linear_attention_scores(layer, hidden, tokens.valid, index)
        with compat.without_autocast(hidden):
            return state_read_out(query, key, gate, lambda block: self._seen(tokens, index[:, block]), valid.float())

    def _received(
        self, layer: nn.Module, key: Tensor, tokens: TokenMap, rotary: Rotary, query: Tensor, index: Tensor, valid: Tensor
    ) -> Tensor:
        """Attention that rows ``index`` [B, Q] pay to every row: [B, T] float32, [B, T, H] by head."""
        scaling = self.adapter.scaling(layer)
        divisor = _by_position(self.adapter, key, rotary, index, scaling) if self.reducer.scoring_rules().score_positions == "divided" else None
        return query_attention(
            query, key, scaling, lambda block: self._seen(tokens, index[:, block]), valid.float(), heads=self.reducer.score_heads, divisor=divisor
        )

    def _seen(self, tokens: TokenMap, index: Tensor) -> Tensor:
        """Which rows each query row sees [B, Q, T]: what precedes it, or what the family's own mask shows; windows are lifted."""
        allowed = tokens.valid[:, None].expand(-1, index.shape[1], -1)
        if self.reducer.scoring_rules().score_mask == "none":
            return allowed
        if self.prepared_masks is None:
            return allowed & (torch.arange(allowed.shape[2], device=index.device) <= index[..., None])
        mask = compat.is_allowed(self.prepared_masks[:, 0]).expand(len(index), -1, -1).to(index.device)
        return allowed & gather_rows(gather_rows(mask, gather_rows(tokens.entry_index, index)).transpose(1, 2), tokens.entry_index).transpose(1, 2)

    def _query_rows(self, tokens: TokenMap) -> Tensor:
        """Query rows among the current ones; samples without any ask with their last visual token."""
        asks = self.queries.to(tokens.prompt_index.device).gather(1, tokens.prompt_index) & tokens.valid
        if all(self.num_queries):
            return asks
        empty = upload([n == 0 for n in self.num_queries], asks.device)
        last_visual = last_true(tokens.visual)
        nothing = ~tokens.visual.any(1, keepdim=True)  # no image either: any row will do, nothing is dropped
        last_visual = last_visual | (nothing & (torch.arange(asks.shape[1], device=asks.device) == asks.shape[1] - 1))
        return torch.where(empty[:, None], last_visual, asks)


def _by_position(adapter: Adapter, key: Tensor, rotary: Rotary, index: Tensor, scaling: float) -> Callable[[slice], Tensor]:
    """What positions alone would give the queries of a slice: products [B, q, T] of rotated rows of ones, times the scaling."""
    ones = adapter.rotate(key.new_ones(len(index), 1, *key.shape[2:], dtype=torch.float32), tuple(t.float() for t in rotary))[:, 0]
    least = LEAST * key.shape[3] * scaling
    return lambda block: (gather_rows(ones, index[:, block]) @ ones.transpose(1, 2) * scaling).clamp(min=least)


def layer_device(layer: nn.Module, hidden: Tensor) -> torch.device:
    """Where a layer's sub-modules run; offloaded layers move their inputs by themselves."""
    if not compat.is_dispatched(layer):
        return hidden.device
    device = next(layer.parameters()).device
    return hidden.device if device.type == "meta" else device
