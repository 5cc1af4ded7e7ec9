"""T2V: rank and drop visual tokens between decoder layers, and give every later layer the tables of its own rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.flow import compat
from duet_vlm.flow.cache import Group, Run
from duet_vlm.flow.drop import Decided, Dropped, again, choose
from duet_vlm.flow.encoder import check_finite
from duet_vlm.flow.made import Made
from duet_vlm.flow.masks import cut_mask
from duet_vlm.flow.positions import group_rotary
from duet_vlm.flow.probe import prediction_gradient
from duet_vlm.flow.ranking import Ranking, Signals
from duet_vlm.models.adapter import FULL, LINEAR, Adapter, Rotary
from duet_vlm.ops.ragged import take, take_last
from duet_vlm.reducer import DecoderReducer, Reducer
from duet_vlm.tokens import TokenMap

NAMES = {"scores": "the attention scores", "among": "the attention scores", "keys": "the keys"}


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
        self.kinds = adapter.layer_types
        self.prepared = _prepared(kwargs.get("attention_mask")) if FULL in self.kinds else None  # windows are lifted for ranking
        self.asked = self.reducer.asked(run.depth) if isinstance(self.reducer, DecoderReducer) else frozenset()
        self.drops = {layer: keeps for layer in range(run.depth) if (keeps := self._keeps_at(layer)) is not None}
        self._check_rows_left()
        self.ranking = Ranking(self.reducer, adapter, queries, asking, self.prepared) if isinstance(self.reducer, DecoderReducer) else None
        self.scored_at = scoring_layers(adapter, self.reducer, [layer for layer in self.drops if _any(run.ranked(layer))])
        run.asking = tuple(max(1, n) for n in asking)
        run.scored_layers = tuple(sorted(set(self.scored_at.values())))
        self.probes = isinstance(self.reducer, DecoderReducer) and "gradient" in self.reducer.needs
        looks = isinstance(self.reducer, DecoderReducer) and "before" in self.reducer.needs
        self.looks_back = {drop for drop in self.drops if looks and drop not in replay and _any(run.ranked(drop))}
        self.to_rank = {scored for drop, scored in self.scored_at.items() if drop not in replay}  # layers that have not done so yet
        self.signals: dict[int, Signals] = {}  # by the layer that made them, of the rows that are there now
        self.earlier: dict[int, Tensor] = {}  # by drop, what the layer before it read
        self.made = Made()
        self.dropped: dict[int, Dropped] = {}
        self.rotaries: dict[Any, Rotary] = {}
        self.masks: dict[Any, Any] = {}
        self.tables: list[Any] = []  # how rotary tables of half precision were made
        self.entered: dict[str, dict[str, Any]] = {}  # by kind of layer, what the first was called with for the rows that entered

    def _keeps_at(self, layer: int) -> list[int] | None:
        """Visual tokens per sample that stay before ``layer``, None where nothing changes and nobody is asked."""
        now = self.run.visual(layer)
        return now if now != self.run.visual(layer - 1) or (layer in self.asked and any(now)) else None

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
        if index == 0 and getattr(self.reducer, "text_query", "") == "raters" and self.ranking is not None and self.ranking.raters is None:
            with torch.no_grad():
                self.ranking.choose_raters(hidden.detach(), self.run.groups[0].tokens.to(hidden.device))
        if self.scored_at.get(index) == index:  # by what all rows would do here
            self._rank(index, layer, hidden, kwargs)
        if self.probes:
            self.entered.setdefault(self.kinds[index], dict(kwargs))
        if index in self.drops:
            hidden = self._drop(index, layer, hidden, kwargs)
        self._rank(index, layer, hidden, kwargs)  # for a later drop, by what those do that are left
        if index + 1 in self.looks_back:
            self.earlier[index + 1] = hidden.detach()
        kwargs.update(self._for(self.run.group(index), index, hidden, kwargs))
        return hidden

    def _for(self, group: Group, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What layer ``index`` is to be given for the rows of ``group``, of the ``kwargs`` for those that entered."""
        if group is self.run.groups[0]:
            return {}
        given = {
            "position_embeddings": self._rotary(group, index, hidden, kwargs["position_embeddings"]),
            "attention_mask": self._mask(group, index, hidden, kwargs.get("attention_mask")),
        }
        if kwargs.get("position_ids") is not None:
            given["position_ids"] = take_last(kwargs["position_ids"], group.tokens.row.to(hidden.device))
        return given

    def reuses(self, index: int, layer: nn.Module) -> bool:
        """Whether ``layer`` ranks and can then take over what ranking makes: not where gradients must pass, not in a fixed graph."""
        merges = index in self.drops and getattr(self.reducer, "merges", False)  # then the layer reads other rows than those it ranks
        return index in self.to_rank and not merges and not torch.is_grad_enabled() and compat.is_eager(layer)

    # ---- what the layer is given

    def _rotary(self, group: Group, index: int, hidden: Tensor, rotary: Rotary) -> Rotary:
        if group is self.run.groups[0]:
            return rotary
        key = (group.first_layer, self.kinds[index])
        if key not in self.rotaries:
            tokens = group.tokens.to(rotary[0].device)
            self.rotaries[key] = group_rotary(self.adapter, hidden, rotary, tokens, self.run.positions, self.kinds[index])
        return self.rotaries[key]

    def _exact_rotary(self, group: Group, index: int, hidden: Tensor, rotary: Rotary) -> Rotary:
        """The same for ranking: in float32, where the model's are half precision. Rounded tables make attention depend on where a prompt begins."""
        for module, args, kwargs, made in self.tables:
            if made[0] is rotary[0]:
                exact = module.forward(args[0].float(), *args[1:], **kwargs)
                if group is self.run.groups[0]:
                    return exact
                tokens = group.tokens.to(exact[0].device)
                return group_rotary(self.adapter, hidden[..., :1].float(), exact, tokens, self.run.positions, self.kinds[index])
        return self._rotary(group, index, hidden, rotary)

    def _from_zero(self, group: Group, index: int, hidden: Tensor, rotary: Rotary) -> Rotary | None:
        """Tables of half precision for positions that begin at 0 with each prompt, so that they are rounded as those of the prompt alone; None where
        the model's are exact. Attention only knows distances."""
        first = self.run.groups[0]
        for module, args, kwargs, made in self.tables:
            if made[0] is rotary[0] and self.run.positions == "keep":
                positions = args[1] if len(args) > 1 else kwargs["position_ids"]
                valid = first.tokens.valid.to(positions.device)
                positions = positions.expand(*positions.shape[:-2], *valid.shape)
                begin = valid.long().argmax(1, keepdim=True).expand(*positions.shape[:-1], 1)
                positions = (positions - positions.gather(-1, begin)).clamp(min=0)
                given = (args[0], positions, *args[2:]) if len(args) > 1 else args
                made = module.forward(*given, **kwargs | ({} if len(args) > 1 else {"position_ids": positions}))
                return group_rotary(self.adapter, hidden, made, group.tokens.to(made[0].device), self.run.positions, self.kinds[index])
        return None

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

    def _rank(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        if index in self.to_rank:
            with torch.no_grad():
                self.signals[index] = self._signals(index, layer, hidden, kwargs)
            self.to_rank.remove(index)

    def _signals(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Signals:
        """What ``layer`` says of each row."""
        assert self.ranking is not None  # a method that decides
        group = self.run.group(index)
        rotary = self._exact_rotary(group, index, hidden, kwargs["position_embeddings"])
        visual = max(self.run.visual(-1 if group is self.run.groups[0] else group.first_layer))
        state = self.kinds[index] == LINEAR
        made = self.ranking.signals(layer, hidden.detach(), group.tokens.to(hidden.device), rotary, visual, state)
        self.made.recording = False
        if self.adapter.key_projection(layer) in self.made.by:
            self.run.reused_layers = (*self.run.reused_layers, index)
        for name, rows in made.items():
            self.run.finite.append((compat.finite(rows), f"{NAMES[name]} at decoder layer {index}"))
            check_finite(*self.run.finite[-1])
        return {name: rows.to(hidden.device) for name, rows in made.items()}

    # ---- dropping

    def _drop(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if index not in self.dropped:
            with compat.without_autocast(hidden):
                self.dropped[index] = self._decide(index, layer, hidden, kwargs)
            self.made.keep(self.dropped[index].chosen)
        with compat.without_autocast(hidden):
            return self.dropped[index].rows_of(hidden)

    def _decide(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Dropped:
        """Who goes on; opens the group of layers that read them."""
        group = self.run.group(index - 1) if index else self.run.groups[0]
        tokens = group.tokens.to(hidden.device)
        alive = self.run.visual(index - 1)
        lengths = tuple(n - b + k for n, b, k in zip(group.lengths, alive, self.drops[index], strict=True))
        ranked = self.run.ranked(index - 1)
        if index in self.replay:
            decided = again(self.replay[index], tokens, self.run.rows, max(map(sum, ranked)))
        elif _any(self.run.ranked(index)):
            decided = self._chosen(index, layer, hidden, kwargs, tokens)
        else:
            decided = Decided(torch.zeros_like(tokens.visual))
        keep = (tokens.valid & ~tokens.ranked) | decided.stays
        dropped = Dropped.of(decided, keep, max(lengths), in_order=self.run.positions == "keep")
        self.run.groups.append(Group(index, tokens.take(dropped.chosen, dropped.valid), lengths, decided.by_slot(tokens)))
        self.replay.setdefault(index, self.run.groups[-1])
        later = {scored for drop, scored in self.scored_at.items() if drop > index}
        self.signals = {
            scored: {name: take(rows, dropped.chosen) for name, rows in made.items()} for scored, made in self.signals.items() if scored in later
        }
        self.earlier.pop(index, None)
        return dropped

    def _chosen(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any], tokens: TokenMap) -> Decided:
        """What the method keeps of the visual rows, and merges."""
        reducer = self.reducer
        assert isinstance(reducer, DecoderReducer) and self.ranking is not None
        made = dict(self.signals.get(self.scored_at.get(index, -1), {}))
        if reducer.needs & {"rows", "text"}:
            made["rows"] = hidden.detach()
        if "before" in reducer.needs:
            made["before"] = self.earlier[index].to(hidden.device)
        if "gradient" in reducer.needs:
            made["gradient"] = self._gradient(index, layer, hidden, kwargs, tokens)
        with torch.no_grad():
            return choose(self.run, self.ranking, index, tokens, made)

    def _gradient(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any], tokens: TokenMap) -> Tensor:
        """Of a prediction made through the method's probe, by the rows in front of ``layer``."""
        reducer = self.reducer
        assert isinstance(reducer, DecoderReducer)
        last = reducer.probe == "last"
        at = self.adapter.probed_layer(index, last)
        through = layer if at == index else self.adapter.layers[at]
        group = self.run.group(index - 1) if index else self.run.groups[0]
        given = self._given(group, at, hidden, kwargs, index) | {"past_key_values": None, "use_cache": False}
        if (tables := self._from_zero(group, at, hidden, self.entered.get(self.kinds[at], kwargs)["position_embeddings"])) is not None:
            given["position_embeddings"] = tables
        asks = tokens.valid & (tokens.slot < self.run.rows - self.run.drafts)
        return prediction_gradient(self.adapter, through, hidden, asks, given, reducer.name, last)

    def _given(self, group: Group, at: int, hidden: Tensor, kwargs: dict[str, Any], index: int) -> dict[str, Any]:
        """What layer ``at`` is called with for the rows of ``group``, where layer ``index`` would be with ``kwargs``; layers of another kind are
        given other tables."""
        kind = self.kinds[at]
        entered = kwargs if kind == self.kinds[index] else self.entered.get(kind, kwargs)
        given = entered | self._for(group, at, hidden, entered)
        if kind == self.kinds[index] or kind in self.entered:
            return given
        valid = group.tokens.valid.to(hidden.device)  # the first layer of this kind is still to come
        if self.prepared is not None:
            return given | {"attention_mask": cut_mask(self.prepared, group.tokens.row.to(self.prepared.device), valid.to(self.prepared.device))}
        config = self.adapter.text_model.config
        return given | {"attention_mask": compat.decoder_mask(config, hidden, valid if group.padded else None, None, at)}


def scoring_layers(adapter: Adapter, reducer: Reducer, drops: list[int]) -> dict[int, int]:
    """For each drop the layer whose attention ranks it: the method's own, or the last one before it that has attention.

    Raises
    ------
    ValueError
        If there is no such layer, or none that a gradient can go through.
    """
    if not isinstance(reducer, DecoderReducer):
        return {}
    if "gradient" in reducer.needs:
        _check_probes(adapter, reducer, drops)
    if not reducer.attends():
        return {}
    scored = {drop: adapter.ranking_layer(drop - reducer.score_before, reducer.score_states) for drop in drops}
    for drop, layer in scored.items():
        if layer < 0:
            lowest = adapter.first_attention + reducer.score_before
            raise ValueError(
                f"{reducer.name} drops before decoder layer {drop}, but {adapter.family} has no attention to rank tokens by before layer "
                f"{adapter.first_attention}: drop before layer {lowest} or later"
            )
    return scored


def _check_probes(adapter: Adapter, reducer: DecoderReducer, drops: list[int]) -> None:
    last = reducer.probe == "last"
    for drop in drops:
        if adapter.probed_layer(drop, last) < 0:
            there, where = ("before", f"from layer {adapter.first_attention + 1} on") if last else ("from there on", "earlier")
            raise ValueError(
                f"{reducer.name} drops before decoder layer {drop}, but {adapter.family} has no attention {there} that a gradient can go through: "
                f"drop {where}"
            )


def _any(counts: list[list[int]]) -> bool:
    return any(any(row) for row in counts)


def _prepared(mask: Any) -> Tensor | None:
    """The 4-D mask of full attention, where the caller or the family prepared one."""
    if isinstance(mask, dict):
        mask = mask.get(FULL)
    return mask if isinstance(mask, Tensor) and mask.ndim == 4 else None
