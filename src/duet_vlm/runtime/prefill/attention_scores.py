"""Signals that rank visual tokens inside the decoder: attention of text queries, and keys, of one layer."""

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

MIN_DIVISOR = 0.01  # relative to the product of two rows of ones at one position: the smallest divisor of attention

Signals = dict[str, Tensor]  # signal name -> [B, T, ...], one row for each token of the sequence


class TextAttentionScorer:
    """Computes the signals of one prompt.

    Attributes
    ----------
    queries : Tensor
        [B, S] bool, text queries by prompt position.
    num_queries : list of int
        Per sample.
    prepared_masks : Tensor or None
        4-D mask of full attention, where there is one.
    raters : Tensor or None
        [B, S] bool, the queries that count, once they are chosen.
    """

    def __init__(
        self,
        reducer: DecoderReducer,
        adapter: Adapter,
        queries: Tensor,
        num_queries: list[int],
        prepared_masks: Tensor | None,
    ) -> None:
        self.reducer = reducer
        self.adapter = adapter
        self.queries = queries
        self.num_queries = num_queries
        self.prepared_masks = prepared_masks
        self.raters: Tensor | None = None

    def text_rows(self, tokens: TokenMap) -> tuple[Tensor, Tensor]:
        """The text queries among the current tokens: [B, Q] row numbers, and [B, Q] valid."""
        index, valid = pack_right(self._is_query(tokens), max(1, *self.num_queries))
        if self.raters is not None:
            valid = valid & self.raters.to(valid.device).gather(1, tokens.prompt_index.gather(1, index))
        return index, valid

    def choose_raters(self, embeds: Tensor, tokens: TokenMap) -> None:
        """Choose as raters the text queries that the visual tokens of ``embeds`` [B, T, D] resemble more than the
        average query."""
        index, valid = self.text_rows(tokens)
        visual_rows, visual_valid = pack_right(tokens.visual, tokens.visual.shape[1])
        text = gather_rows(embeds, index).float().transpose(1, 2)
        resemblance = text.new_zeros(valid.shape)
        with compat.without_autocast(embeds):
            for rows, valid_block in zip(
                visual_rows.split(QUERY_BLOCK, 1), visual_valid.split(QUERY_BLOCK, 1), strict=True
            ):
                similarity = (
                    (gather_rows(embeds, rows).float() @ text).masked_fill(~valid[:, None], float("-inf")).softmax(-1)
                )
                resemblance += (similarity * valid_block[..., None]).sum(1)
        mean = (resemblance * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True)
        is_rater = valid & (resemblance > mean)
        # all queries are alike, or there are no visual tokens
        is_rater = torch.where(is_rater.any(1, keepdim=True), is_rater, valid)
        self.raters = torch.zeros_like(self.queries, device=is_rater.device).scatter(
            1, tokens.prompt_index.gather(1, index), is_rater
        )

    def signals(
        self, layer: nn.Module, hidden: Tensor, tokens: TokenMap, rotary: Rotary, num_visual: int, linear: bool = False
    ) -> Signals:
        """The signals that the method declares, from ``layer`` with input ``hidden`` [B, T, D].

        ``num_visual`` is the largest number of visual tokens of a sample; ``linear``: the layer has no softmax
        attention.
        """
        reducer = self.reducer
        device = layer_device(layer, hidden)
        if linear:
            return {"scores": self._linear_scores(layer, hidden.to(device), tokens.to(device))}
        index, valid = self.text_rows(tokens)
        index = index.to(device)
        valid = valid.to(device)
        hidden = hidden.to(device)
        rotary = rotary[0].to(device), rotary[1].to(device)
        tokens = tokens.to(device)
        visual = index[:, :0]
        visual_valid = valid[:, :0]
        if Input.VISUAL_SELF_ATTENTION in reducer.requires:
            visual, visual_valid = pack_right(tokens.visual, max(1, num_visual))
        with compat.uncached_autocast(hidden):
            query, key = self.adapter.project(layer, hidden, rotary, torch.cat([index, visual], 1))
        with compat.without_autocast(hidden):
            text, visual_query = query.tensor_split((index.shape[1],), 2)
            attention_from = functools.partial(self._attention_from, layer, key, tokens, rotary)
            signals: Signals = {}
            if Input.SCORES in reducer.requires:
                signals["scores"] = attention_from(text, index, valid)
            if Input.VISUAL_SELF_ATTENTION in reducer.requires:
                signals["visual_self_attention"] = attention_from(visual_query, visual, visual_valid)
            if Input.DECODER_KEYS in reducer.requires:
                signals["keys"] = key.transpose(1, 2).flatten(2)
        return signals

    def _linear_scores(self, layer: nn.Module, hidden: Tensor, tokens: TokenMap) -> Tensor:
        """Contribution of every token to the text queries through the state of a linear ``layer``: [B, T] float32."""
        index, valid = self.text_rows(tokens)
        with compat.uncached_autocast(hidden):
            query, key, gate = self.adapter.linear_attention_scores(layer, hidden, tokens.valid, index)
        with compat.without_autocast(hidden):
            return state_read_out(
                query, key, gate, lambda block: self._visible_keys(tokens, index[:, block]), valid.float()
            )

    def _attention_from(
        self,
        layer: nn.Module,
        key: Tensor,
        tokens: TokenMap,
        rotary: Rotary,
        query: Tensor,
        index: Tensor,
        valid: Tensor,
    ) -> Tensor:
        """Attention from queries ``index`` [B, Q] to every token: [B, T] float32, [B, T, H] by head."""
        scaling = self.adapter.scaling(layer)
        divisor = (
            _position_divisor(self.adapter, key, rotary, index, scaling)
            if self.reducer.scoring_rules().score_positions == "divided"
            else None
        )
        return query_attention(
            query,
            key,
            scaling,
            lambda block: self._visible_keys(tokens, index[:, block]),
            valid.float(),
            heads=self.reducer.scoring_rules().score_heads,
            divisor=divisor,
        )

    def _visible_keys(self, tokens: TokenMap, index: Tensor) -> Tensor:
        """Visible keys of each query [B, Q, T] bool: the preceding ones, or those of the family's own mask.

        Windows are ignored.
        """
        allowed = tokens.valid[:, None].expand(-1, index.shape[1], -1)
        if self.reducer.scoring_rules().score_mask == "none":
            return allowed
        if self.prepared_masks is None:
            return allowed & (torch.arange(allowed.shape[2], device=index.device) <= index[..., None])
        mask = compat.is_allowed(self.prepared_masks[:, 0]).expand(len(index), -1, -1).to(index.device)
        return allowed & gather_rows(
            gather_rows(mask, gather_rows(tokens.entry_index, index)).transpose(1, 2), tokens.entry_index
        ).transpose(1, 2)

    def _is_query(self, tokens: TokenMap) -> Tensor:
        """[B, T] bool, queries among the current tokens; samples without any use their last visual token."""
        is_query = self.queries.to(tokens.prompt_index.device).gather(1, tokens.prompt_index) & tokens.valid
        if all(self.num_queries):
            return is_query
        without_queries = upload([n == 0 for n in self.num_queries], is_query.device)
        last_visual = last_true(tokens.visual)
        without_image = ~tokens.visual.any(1, keepdim=True)  # no image either: any query will do, nothing is dropped
        last_visual = last_visual | (
            without_image & (torch.arange(is_query.shape[1], device=is_query.device) == is_query.shape[1] - 1)
        )
        return torch.where(without_queries[:, None], last_visual, is_query)


def _position_divisor(
    adapter: Adapter, key: Tensor, rotary: Rotary, index: Tensor, scaling: float
) -> Callable[[slice], Tensor]:
    """The attention that positions alone would give the queries of a slice.

    Scaled products [B, q, T] of rotated rows of ones.
    """
    ones = adapter.rotate(
        key.new_ones(len(index), 1, *key.shape[2:], dtype=torch.float32), tuple(t.float() for t in rotary)
    )[:, 0]
    min_divisor = MIN_DIVISOR * key.shape[3] * scaling
    return lambda block: (gather_rows(ones, index[:, block]) @ ones.transpose(1, 2) * scaling).clamp(min=min_divisor)


def layer_device(layer: nn.Module, hidden: Tensor) -> torch.device:
    """The device of a layer's sub-modules; offloaded layers move their inputs themselves."""
    if not compat.is_dispatched(layer):
        return hidden.device
    device = next(layer.parameters()).device
    return hidden.device if device.type == "meta" else device
