"""T2V: rank and drop visual tokens between decoder layers, and give every later layer the tables of its own rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import FULL, LINEAR, Adapter, Rotary
from duet_vlm.ops.ragged import gather_last_dim, gather_rows
from duet_vlm.planning.tokens import TokenMap
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.decoder import DecoderReducer
from duet_vlm.reducers.inputs import Input
from duet_vlm.runtime import compat
from duet_vlm.runtime.decode.cache import LayerGroup, PromptState
from duet_vlm.runtime.encode.encoder import check_finite
from duet_vlm.runtime.prefill.attention_scores import Signals, TextAttentionScorer
from duet_vlm.runtime.prefill.drop_stage import StageDecision, StageGather, decide_stage, replay
from duet_vlm.runtime.prefill.masks import cut_mask
from duet_vlm.runtime.prefill.positions import group_rotary
from duet_vlm.runtime.prefill.prediction_gradient import prediction_gradient
from duet_vlm.runtime.prefill.projection_reuse import ProjectionCache

NAMES = {"scores": "the attention scores", "visual_self_attention": "the attention scores", "keys": "the keys"}


class PrefillPass:
    """One pass of a prompt through the decoder. Decisions are made once per layer and replayed if a layer runs again (checkpointing)."""

    def __init__(
        self,
        run: PromptState,
        adapter: Adapter,
        cache: Any,
        queries: Tensor,
        asking: list[int],
        kwargs: dict[str, Any],
        replay: dict[Any, Any],
    ) -> None:
        self.prompt_state, self.adapter, self.reducer, self.cache, self.replay = run, adapter, run.config.reducer, cache, replay
        self.kinds = adapter.layer_types
        self.prepared_masks = _prepared(kwargs.get("attention_mask")) if FULL in self.kinds else None  # windows are lifted for ranking
        self.forced_stages = self.reducer.extra_stages(run.depth)
        self.stages = {layer: keeps for layer in range(run.depth) if (keeps := self._keeps_at(layer)) is not None}
        self._check_rows_left()
        self.scorer = TextAttentionScorer(self.reducer, adapter, queries, asking, self.prepared_masks) if isinstance(self.reducer, DecoderReducer) else None
        self.scored_at = scoring_layers(adapter, self.reducer, [layer for layer in self.stages if _any(run.ranked(layer))])
        run.num_queries = tuple(max(1, n) for n in asking)
        run.scored_layers = tuple(sorted(set(self.scored_at.values())))
        self.probes = Input.GRADIENT in self.reducer.requires
        looks = Input.PREVIOUS_HIDDEN_STATES in self.reducer.requires
        self.needs_previous_hidden = {drop for drop in self.stages if looks and drop not in replay and _any(run.ranked(drop))}
        self.layers_to_score = {scored for drop, scored in self.scored_at.items() if drop not in replay}  # layers that have not done so yet
        self.signals: dict[int, Signals] = {}  # by the layer that made them, of the rows that are there now
        self.previous_hidden: dict[int, Tensor] = {}  # by drop, what the layer before it read
        self.projection_cache = ProjectionCache()
        self.stage_gathers: dict[int, StageGather] = {}
        self.rotaries: dict[Any, Rotary] = {}
        self.masks: dict[Any, Any] = {}
        self.tables: list[Any] = []  # how rotary tables of half precision were made
        self.entered: dict[str, dict[str, Any]] = {}  # by kind of layer, what the first was called with for the rows that entered

    def _keeps_at(self, layer: int) -> list[int] | None:
        """Visual tokens per sample that stay before ``layer``, None where nothing changes and nobody is asked."""
        now = self.prompt_state.visual(layer)
        return now if now != self.prompt_state.visual(layer - 1) or (layer in self.forced_stages and any(now)) else None

    def _check_rows_left(self) -> None:
        """Only without ``protect_predicting_tokens``: a prompt that is nothing but an image, of which nothing is kept."""
        first = zip(self.prompt_state.layer_groups[0].lengths, self.prompt_state.visual(-1), self.prompt_state.visual(self.prompt_state.depth - 1), strict=True)
        for sample, (rows, entered, left) in enumerate(first):
            if rows and rows - entered + left == 0:
                raise ValueError(
                    f"sample {sample} has no row left at the end of {self.reducer.name}'s schedule, and none that could predict: use "
                    "protect_predicting_tokens=True, or write text behind the image"
                )

    def at_layer(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Rows that ``layer`` reads: score, drop, and cut its arguments to them."""
        if index == 0 and self.reducer.text_query == "raters" and self.scorer is not None and self.scorer.raters is None:
            with torch.no_grad():
                self.scorer.choose_raters(hidden.detach(), self.prompt_state.layer_groups[0].tokens.to(hidden.device))
        if self.scored_at.get(index) == index:  # by what all rows would do here
            self._rank(index, layer, hidden, kwargs)
        if self.probes:
            self.entered.setdefault(self.kinds[index], dict(kwargs))
        if index in self.stages:
            hidden = self._drop(index, layer, hidden, kwargs)
        self._rank(index, layer, hidden, kwargs)  # for a later drop, by what those do that are left
        if index + 1 in self.needs_previous_hidden:
            self.previous_hidden[index + 1] = hidden.detach()
        kwargs.update(self.layer_kwargs(self.prompt_state.layer_group(index), index, hidden, kwargs))
        return hidden

    def layer_kwargs(self, group: LayerGroup, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What layer ``index`` is to be given for the rows of ``group``, of the ``kwargs`` for those that entered."""
        if group is self.prompt_state.layer_groups[0]:
            return {}
        given = {
            "position_embeddings": self._rotary(group, index, hidden, kwargs["position_embeddings"]),
            "attention_mask": self._mask(group, index, hidden, kwargs.get("attention_mask")),
        }
        if kwargs.get("position_ids") is not None:
            given["position_ids"] = gather_last_dim(kwargs["position_ids"], group.tokens.entry_index.to(hidden.device))
        return given

    def reuses(self, index: int, layer: nn.Module) -> bool:
        """Whether ``layer`` ranks and can then take over what ranking makes: not where gradients must pass, not in a fixed graph."""
        merges = index in self.stages and self.reducer.merges  # then the layer reads other rows than those it ranks
        return index in self.layers_to_score and not merges and not torch.is_grad_enabled() and compat.is_eager(layer)

    # ---- what the layer is given

    def _rotary(self, group: LayerGroup, index: int, hidden: Tensor, rotary: Rotary) -> Rotary:
        if group is self.prompt_state.layer_groups[0]:
            return rotary
        key = (group.first_layer, self.kinds[index])
        if key not in self.rotaries:
            tokens = group.tokens.to(rotary[0].device)
            self.rotaries[key] = group_rotary(self.adapter, hidden, rotary, tokens, self.prompt_state.positions, self.kinds[index])
        return self.rotaries[key]

    def _exact_rotary(self, group: LayerGroup, index: int, hidden: Tensor, rotary: Rotary) -> Rotary:
        """The same for ranking: in float32, where the model's are half precision. Rounded tables make attention depend on where a prompt begins."""
        for module, args, kwargs, made in self.tables:
            if made[0] is rotary[0]:
                exact = module.forward(args[0].float(), *args[1:], **kwargs)
                if group is self.prompt_state.layer_groups[0]:
                    return exact
                tokens = group.tokens.to(exact[0].device)
                return group_rotary(self.adapter, hidden[..., :1].float(), exact, tokens, self.prompt_state.positions, self.kinds[index])
        return self._rotary(group, index, hidden, rotary)

    def _from_zero(self, group: LayerGroup, index: int, hidden: Tensor, rotary: Rotary) -> Rotary | None:
        """Tables of half precision for positions that begin at 0 with each prompt, so that they are rounded as those of the prompt alone; None where
        the model's are exact. Attention only knows distances."""
        first = self.prompt_state.layer_groups[0]
        for module, args, kwargs, made in self.tables:
            if made[0] is rotary[0] and self.prompt_state.positions == "keep":
                positions = args[1] if len(args) > 1 else kwargs["position_ids"]
                valid = first.tokens.valid.to(positions.device)
                positions = positions.expand(*positions.shape[:-2], *valid.shape)
                begin = valid.long().argmax(1, keepdim=True).expand(*positions.shape[:-1], 1)
                positions = (positions - positions.gather(-1, begin)).clamp(min=0)
                given = (args[0], positions, *args[2:]) if len(args) > 1 else args
                made = module.forward(*given, **kwargs | ({} if len(args) > 1 else {"position_ids": positions}))
                return group_rotary(self.adapter, hidden, made, group.tokens.to(made[0].device), self.prompt_state.positions, self.kinds[index])
        return None

    def _mask(self, group: LayerGroup, index: int, hidden: Tensor, mask: Any) -> Any:
        key = (group.first_layer, self.kinds[index], id(mask))
        if key not in self.masks:
            self.masks[key] = (mask, self._new_mask(group, index, hidden, mask))  # holding the key object keeps its id unique
        return self.masks[key][1]

    def _new_mask(self, group: LayerGroup, index: int, hidden: Tensor, mask: Any) -> Any:
        if mask is None and not group.padded:  # the model saw that nothing is hidden, and fewer rows hide no more
            return None
        valid = group.tokens.valid.to(hidden.device)
        if self.kinds[index] == LINEAR:
            return valid.long() if group.padded else None
        if isinstance(mask, Tensor) and mask.ndim == 4 and (self.prepared_masks is not None or self.kinds[index] != FULL):
            return cut_mask(mask, group.tokens.entry_index.to(mask.device), group.tokens.valid.to(mask.device))
        return compat.decoder_mask(self.adapter.text_model.config, hidden, valid if group.padded else None, self.cache, index)

    # ---- ranking

    def _rank(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        if index in self.layers_to_score:
            with torch.no_grad():
                self.signals[index] = self._signals(index, layer, hidden, kwargs)
            self.layers_to_score.remove(index)

    def _signals(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Signals:
        """What ``layer`` says of each row."""
        assert self.scorer is not None  # a method that decides
        group = self.prompt_state.layer_group(index)
        rotary = self._exact_rotary(group, index, hidden, kwargs["position_embeddings"])
        visual = max(self.prompt_state.visual(-1 if group is self.prompt_state.layer_groups[0] else group.first_layer))
        state = self.kinds[index] == LINEAR
        made = self.scorer.signals(layer, hidden.detach(), group.tokens.to(hidden.device), rotary, visual, state)
        self.projection_cache.recording = False
        if self.adapter.key_projection(layer) in self.projection_cache.by_module:
            self.prompt_state.reused_layers = (*self.prompt_state.reused_layers, index)
        for name, rows in made.items():
            self.prompt_state.finite.append((compat.finite(rows), f"{NAMES[name]} at decoder layer {index}"))
            check_finite(*self.prompt_state.finite[-1])
        return {name: rows.to(hidden.device) for name, rows in made.items()}

    # ---- dropping

    def _drop(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if index not in self.stage_gathers:
            with compat.without_autocast(hidden):
                self.stage_gathers[index] = self._decide(index, layer, hidden, kwargs)
            self.projection_cache.keep(self.stage_gathers[index].index)
        with compat.without_autocast(hidden):
            return self.stage_gathers[index].rows_of(hidden)

    def _decide(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> StageGather:
        """Who goes on; opens the group of layers that read them."""
        group = self.prompt_state.layer_group(index - 1) if index else self.prompt_state.layer_groups[0]
        tokens = group.tokens.to(hidden.device)
        alive = self.prompt_state.visual(index - 1)
        lengths = tuple(n - b + k for n, b, k in zip(group.lengths, alive, self.stages[index], strict=True))
        ranked = self.prompt_state.ranked(index - 1)
        if index in self.replay:
            decided = replay(self.replay[index], tokens, self.prompt_state.prompt_len, max(map(sum, ranked)))
        elif _any(self.prompt_state.ranked(index)):
            decided = self._chosen(index, layer, hidden, kwargs, tokens)
        else:
            decided = StageDecision(torch.zeros_like(tokens.visual))
        keep = (tokens.valid & ~tokens.prunable) | decided.kept
        dropped = StageGather.of(decided, keep, max(lengths), in_order=self.prompt_state.positions == "keep")
        self.prompt_state.layer_groups.append(LayerGroup(index, tokens.gather(dropped.index, dropped.valid), lengths, decided.by_prompt_position(tokens)))
        self.replay.setdefault(index, self.prompt_state.layer_groups[-1])
        later = {scored for drop, scored in self.scored_at.items() if drop > index}
        self.signals = {
            scored: {name: gather_rows(rows, dropped.index) for name, rows in made.items()} for scored, made in self.signals.items() if scored in later
        }
        self.previous_hidden.pop(index, None)
        return dropped

    def _chosen(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any], tokens: TokenMap) -> StageDecision:
        """What the method keeps of the visual rows, and merges."""
        reducer = self.reducer
        assert isinstance(reducer, DecoderReducer) and self.scorer is not None
        made = dict(self.signals.get(self.scored_at.get(index, -1), {}))
        if reducer.requires & {Input.HIDDEN_STATES, Input.TEXT_HIDDEN_STATES}:
            made["hidden_states"] = hidden.detach()
        if Input.PREVIOUS_HIDDEN_STATES in reducer.requires:
            made["previous_hidden_states"] = self.previous_hidden[index].to(hidden.device)
        if Input.GRADIENT in reducer.requires:
            made["gradient"] = self._gradient(index, layer, hidden, kwargs, tokens)
        with torch.no_grad():
            return decide_stage(self.prompt_state, self.scorer, index, tokens, made)

    def _gradient(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any], tokens: TokenMap) -> Tensor:
        """Of a prediction made through the method's probe, by the rows in front of ``layer``."""
        reducer = self.reducer
        assert isinstance(reducer, DecoderReducer)
        last = reducer.scoring_rules().probe == "last"
        at = self.adapter.probed_layer(index, last)
        through = layer if at == index else self.adapter.layers[at]
        group = self.prompt_state.layer_group(index - 1) if index else self.prompt_state.layer_groups[0]
        given = self._given(group, at, hidden, kwargs, index) | {"past_key_values": None, "use_cache": False}
        if (tables := self._from_zero(group, at, hidden, self.entered.get(self.kinds[at], kwargs)["position_embeddings"])) is not None:
            given["position_embeddings"] = tables
        asks = tokens.valid & (tokens.prompt_index < self.prompt_state.prompt_len - self.prompt_state.drafts)
        return prediction_gradient(self.adapter, through, hidden, asks, given, reducer.name, last)

    def _given(self, group: LayerGroup, at: int, hidden: Tensor, kwargs: dict[str, Any], index: int) -> dict[str, Any]:
        """What layer ``at`` is called with for the rows of ``group``, where layer ``index`` would be with ``kwargs``; layers of another kind are
        given other tables."""
        kind = self.kinds[at]
        entered = kwargs if kind == self.kinds[index] else self.entered.get(kind, kwargs)
        given = entered | self.layer_kwargs(group, at, hidden, entered)
        if kind == self.kinds[index] or kind in self.entered:
            return given
        valid = group.tokens.valid.to(hidden.device)  # the first layer of this kind is still to come
        if self.prepared_masks is not None:
            return given | {"attention_mask": cut_mask(self.prepared_masks, group.tokens.entry_index.to(self.prepared_masks.device), valid.to(self.prepared_masks.device))}
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
    if Input.GRADIENT in reducer.requires:
        _check_probes(adapter, reducer, drops)
    if not reducer.uses_attention():
        return {}
    scored = {drop: adapter.ranking_layer(drop - reducer.score_layer_offset, reducer.score_states) for drop in drops}
    for drop, layer in scored.items():
        if layer < 0:
            lowest = adapter.first_attention + reducer.score_layer_offset
            raise ValueError(
                f"{reducer.name} drops before decoder layer {drop}, but {adapter.family} has no attention to rank tokens by before layer "
                f"{adapter.first_attention}: drop before layer {lowest} or later"
            )
    return scored


def _check_probes(adapter: Adapter, reducer: DecoderReducer, drops: list[int]) -> None:
    last = reducer.scoring_rules().probe == "last"
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
