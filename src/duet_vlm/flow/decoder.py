"""T2V: rank and drop visual tokens between decoder layers, and give every later layer the tables of its own rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.flow import compat
from duet_vlm.flow.cache import Group, Run
from duet_vlm.flow.encoder import check_finite
from duet_vlm.flow.made import Made
from duet_vlm.flow.masks import cut_mask
from duet_vlm.flow.positions import group_rotary
from duet_vlm.flow.verify import checked_mask
from duet_vlm.models.adapter import FULL, LINEAR, Adapter, Rotary
from duet_vlm.ops.ragged import last_of, pack_left, pack_right, take, take_last
from duet_vlm.ops.score import query_attention
from duet_vlm.ops.spans import SpanRows
from duet_vlm.reducer import DecoderReducer, Reducer, TextView
from duet_vlm.tokens import TokenMap


class PrefillPass:
    """One pass of a prompt through the decoder. Decisions are made once per layer and replayed if a layer runs again (checkpointing)."""

    def __init__(
        self,
        run: Run,
        adapter: Adapter,
        cache: Any,
        queries: Tensor,
        asking: list[int],
        kwargs: dict[str, Any],
        replay: dict[Any, Any],
    ) -> None:
        self.run, self.adapter, self.reducer, self.cache, self.replay = run, adapter, run.rules.reducer, cache, replay
        self.queries, self.asking = queries, asking
        self.kinds = adapter.layer_types
        self.prepared = _prepared(kwargs.get("attention_mask")) if FULL in self.kinds else None  # windows are lifted for ranking
        self.drops = {layer: keeps for layer in range(run.depth) if (keeps := self._keeps_at(layer)) is not None}
        self._check_rows_left()
        self.scored_at = scoring_layers(adapter, self.reducer, [layer for layer in self.drops if _any(run.ranked(layer))])
        run.asking = tuple(max(1, n) for n in asking)
        run.scored_layers = tuple(sorted(set(self.scored_at.values())))
        self.to_rank = {scored for drop, scored in self.scored_at.items() if drop not in replay}  # layers that have not done so yet
        self.scores: dict[int, Tensor] = {}  # by the layer that made them, of the rows that are there now
        self.made = Made()
        self.dropped: dict[int, Tensor] = {}
        self.rotaries: dict[Any, Rotary] = {}
        self.masks: dict[Any, Any] = {}

    def _keeps_at(self, layer: int) -> list[int] | None:
        """Visual tokens per sample that stay before ``layer``, None where nothing changes."""
        now = self.run.visual(layer)
        return now if now != self.run.visual(layer - 1) else None

    def _check_rows_left(self) -> None:
        """Only without ``keep_predicting``: a prompt that is nothing but an image, of which nothing is kept."""
        first = zip(self.run.groups[0].lengths, self.run.visual(-1), self.run.visual(self.run.depth - 1), strict=True)
        for sample, (rows, entered, left) in enumerate(first):
            if rows and rows - entered + left == 0:
                raise ValueError(
                    f"sample {sample} has no row left at the end of {self.reducer.name}'s schedule, and none that could predict: use "
                    "keep_predicting=True, or write text behind the image"
                )

    def at_layer(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Rows that ``layer`` reads: score, drop, and cut its arguments to them."""
        if index in self.to_rank:
            with torch.no_grad():
                self.scores[index] = self._score(index, layer, hidden, kwargs)
            self.to_rank.remove(index)
        if index in self.drops:
            hidden = self._drop(index, hidden)
            self.made.keep(self.dropped[index])
        group = self.run.group(index)
        if group is not self.run.groups[0]:
            kwargs["position_embeddings"] = self._rotary(group, index, hidden, kwargs["position_embeddings"])
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = take_last(kwargs["position_ids"], group.tokens.row.to(hidden.device))
            kwargs["attention_mask"] = self._mask(group, index, hidden, kwargs.get("attention_mask"))
        return hidden

    def reuses(self, index: int, layer: nn.Module) -> bool:
        """Whether ``layer`` ranks and can then take over what ranking makes: not where gradients must pass, not in a fixed graph."""
        return index in self.to_rank and not torch.is_grad_enabled() and compat.is_eager(layer)

    # ---- what the layer is given

    def _rotary(self, group: Group, index: int, hidden: Tensor, rotary: Rotary) -> Rotary:
        if group is self.run.groups[0]:
            return rotary
        key = (group.first_layer, self.kinds[index])
        if key not in self.rotaries:
            tokens = group.tokens.to(rotary[0].device)
            self.rotaries[key] = group_rotary(self.adapter, hidden, rotary, tokens, self.run.positions, self.kinds[index])
        return self.rotaries[key]

    def _mask(self, group: Group, index: int, hidden: Tensor, mask: Any) -> Any:
        key = (group.first_layer, self.kinds[index], id(mask))
        if key not in self.masks:
            self.masks[key] = (mask, self._new_mask(group, index, hidden, mask))  # holding the key object keeps its id unique
        return self.masks[key][1]

    def _new_mask(self, group: Group, index: int, hidden: Tensor, mask: Any) -> Any:
        if mask is None and not group.padded:  # the model saw that nothing is hidden, and fewer rows hide no more
            return None
        valid = group.tokens.valid.to(hidden.device)
        if self.kinds[index] == LINEAR:
            return valid.long() if group.padded else None
        if isinstance(mask, Tensor) and mask.ndim == 4 and (self.prepared is not None or self.kinds[index] != FULL):
            return cut_mask(mask, group.tokens.row.to(mask.device), group.tokens.valid.to(mask.device))
        return compat.decoder_mask(self.adapter.text_model.config, hidden, valid if group.padded else None, self.cache, index)

    # ---- ranking

    def _score(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Attention that text pays to each row [B, T] float32."""
        group = self.run.group(index)
        tokens = group.tokens.to(hidden.device)
        rotary = self._rotary(group, index, hidden, kwargs["position_embeddings"])
        received = self._attention(layer, hidden.detach(), tokens, rotary).to(hidden.device)
        self.made.recording = False
        if self.adapter.key_projection(layer) in self.made.by:
            self.run.reused_layers = (*self.run.reused_layers, index)
        self.run.finite.append((compat.finite(received), f"the attention scores at decoder layer {index}"))
        check_finite(*self.run.finite[-1])
        return received

    def _attention(self, layer: nn.Module, hidden: Tensor, tokens: TokenMap, rotary: Rotary) -> Tensor:
        """Attention that the query rows pay to every row: [B, T] float32."""
        index, valid = pack_right(self._query_rows(tokens), max(1, *self.asking))
        device = layer_device(layer, hidden)
        hidden, rotary = hidden.to(device), (rotary[0].to(device), rotary[1].to(device))
        allowed = self._seen(tokens, index).to(device)
        index, valid = index.to(device), valid.to(device)
        with compat.uncached_autocast(hidden):
            query, key = self.adapter.project(layer, hidden, rotary, index)
        with compat.without_autocast(hidden):
            return query_attention(query, key, self.adapter.scaling(layer), allowed, valid.float())

    def _seen(self, tokens: TokenMap, index: Tensor) -> Tensor:
        """Which rows each query row sees [B, Q, T]: what precedes it, or what the family's own mask shows; windows are lifted."""
        allowed = tokens.valid[:, None].expand(-1, index.shape[1], -1)
        assert isinstance(self.reducer, DecoderReducer)
        if self.reducer.score_mask == "none":
            return allowed
        if self.prepared is None:
            return allowed & (torch.arange(allowed.shape[2], device=index.device) <= index[..., None])
        mask = compat.is_allowed(self.prepared[:, 0]).expand(len(index), -1, -1).to(index.device)
        return allowed & take(take(mask, take(tokens.row, index)).transpose(1, 2), tokens.row).transpose(1, 2)

    def _query_rows(self, tokens: TokenMap) -> Tensor:
        """Query rows among the current ones; samples without any ask with their last visual token."""
        asks = self.queries.to(tokens.slot.device).gather(1, tokens.slot) & tokens.valid
        if all(self.asking):
            return asks
        empty = torch.tensor([n == 0 for n in self.asking], device=asks.device)
        last_visual = last_of(tokens.visual)
        nothing = ~tokens.visual.any(1, keepdim=True)  # no image either: any row will do, nothing is dropped
        last_visual = last_visual | (nothing & (torch.arange(asks.shape[1], device=asks.device) == asks.shape[1] - 1))
        return torch.where(empty[:, None], last_visual, asks)

    def _provenance(self, tokens: TokenMap, rows: Tensor) -> tuple[tuple[tuple[int, int], ...], Tensor, Tensor]:
        """For the visual rows [B, V]: the spans as (number in the sample, size), and each row's span and token number."""
        device = rows.device
        spans = tuple((number, span.tokens) for row in self.run.spans for number, span in enumerate(row))
        rank = (self.run.prompt.visual.to(device).cumsum(1) - 1).clamp(min=0)  # visual rank of every prompt slot
        rank = take(rank, take(tokens.slot, rows))
        per_sample = max(len(row) for row in self.run.spans)
        offsets = [[s.offset for s in row] + [self.run.rows] * (per_sample - len(row)) for row in self.run.spans]
        starts = torch.tensor(offsets, device=device)
        first = torch.tensor([sum(len(r) for r in self.run.spans[:b]) for b in range(len(self.run.spans))], device=device)
        number = ((rank[..., None] >= starts[:, None]).sum(-1) - 1).clamp(min=0)
        token = rank - starts.gather(1, number).clamp(max=self.run.rows)
        return spans, (first[:, None] + number).clamp(max=len(spans) - 1), token.clamp(min=0)

    # ---- dropping

    def _drop(self, index: int, hidden: Tensor) -> Tensor:
        if index not in self.dropped:
            self.dropped[index] = self._decide(index, hidden)
        return take(hidden, self.dropped[index].to(hidden.device))

    def _decide(self, index: int, hidden: Tensor) -> Tensor:
        """Rows [B, T'] that go on; opens the group of layers that read them."""
        group = self.run.group(index - 1) if index else self.run.groups[0]
        tokens = group.tokens.to(hidden.device)
        keep = tokens.valid & ~tokens.ranked
        if index in self.replay:
            keep = keep | self._still_there(tokens, self.replay[index].to(hidden.device))
        elif _any(self.run.ranked(index)):
            with compat.without_autocast(hidden):
                keep = keep | self._staying(index, tokens)
        alive = self.run.visual(index - 1)
        lengths = tuple(n - b + k for n, b, k in zip(group.lengths, alive, self.drops[index], strict=True))
        chosen, valid = pack_left(keep, max(lengths))
        self.run.groups.append(Group(index, tokens.take(chosen, valid), lengths))
        self.replay.setdefault(index, self.run.groups[-1].tokens)
        later = {scored for drop, scored in self.scored_at.items() if drop > index}
        self.scores = {scored: take(scores, chosen.to(scores.device)) for scored, scores in self.scores.items() if scored in later}
        return chosen

    def _still_there(self, tokens: TokenMap, then: TokenMap) -> Tensor:
        """Visual rows [B, T] bool that an earlier pass over the same prompt (or a shorter one: new slots are text) kept."""
        kept = then.visual.new_zeros(len(then.slot), self.run.rows, dtype=torch.long).scatter_add(1, then.slot, then.visual.long())
        return tokens.visual & kept.gather(1, tokens.slot).bool()

    def _staying(self, index: int, tokens: TokenMap) -> Tensor:
        """Visual rows [B, T] bool that the method keeps."""
        reducer = self.reducer
        assert isinstance(reducer, DecoderReducer)
        alive, kept = self.run.ranked(index - 1), self.run.ranked(index)
        rows, real = pack_right(tokens.ranked, max(map(sum, alive)))
        scores = self.scores[self.scored_at[index]].to(rows.device).gather(1, rows) if index in self.scored_at else None
        spans, span, token = self._provenance(tokens, rows) if reducer.uses_tokens else ((), None, None)
        if reducer.share == "joint":
            stays = self._choose(TextView(real, torch.tensor([*map(sum, kept)], device=rows.device), spans, span, token, scores))
        else:
            layout = SpanRows.of(alive, rows.shape[1], rows.device)
            columns = [None if x is None else layout.take(x) for x in (span, token, scores)]
            keep = torch.tensor([count for sample in kept for count in sample], device=rows.device)
            stays = layout.put(self._choose(TextView(layout.valid, keep, spans, *columns)))
        return torch.zeros_like(tokens.visual).scatter(1, rows, stays)

    def _choose(self, view: TextView) -> Tensor:
        """What the method keeps of ``view``, checked: [B, V] bool."""
        assert isinstance(self.reducer, DecoderReducer)
        mask, wrong = checked_mask(self.reducer, self.reducer.t2v(view), view.valid, view.keep)
        self.run.wrong.append(wrong)
        return mask


def scoring_layers(adapter: Adapter, reducer: Reducer, drops: list[int]) -> dict[int, int]:
    """For each drop the layer whose attention ranks it: the method's own, or the last one before it that has attention.

    Raises
    ------
    ValueError
        If there is no such layer.
    """
    if not isinstance(reducer, DecoderReducer) or not reducer.uses_text:
        return {}
    scored = {drop: adapter.ranking_layer(drop - reducer.score_before) for drop in drops}
    for drop, layer in scored.items():
        if layer < 0:
            lowest = adapter.first_attention + reducer.score_before
            raise ValueError(
                f"{reducer.name} drops before decoder layer {drop}, but {adapter.family} has no attention to rank tokens by before layer "
                f"{adapter.first_attention}: drop before layer {lowest} or later"
            )
    return scored


def _any(counts: list[list[int]]) -> bool:
    return any(any(row) for row in counts)


def _prepared(mask: Any) -> Tensor | None:
    """The 4-D mask of full attention, where the caller or the family prepared one."""
    if isinstance(mask, dict):
        mask = mask.get(FULL)
    return mask if isinstance(mask, Tensor) and mask.ndim == 4 else None


def layer_device(layer: nn.Module, hidden: Tensor) -> torch.device:
    """Where a layer's sub-modules run; offloaded layers move their inputs by themselves."""
    if not compat.is_dispatched(layer):
        return hidden.device
    device = next(layer.parameters()).device
    return hidden.device if device.type == "meta" else device
