"""The decoder stages (T2V).

Rank and drop visual tokens between layers, and pass every later layer the arguments of its own tokens.
"""

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
from duet_vlm.runtime.masks import cut_mask
from duet_vlm.runtime.prefill.attention_scores import Signals, TextAttentionScorer
from duet_vlm.runtime.prefill.drop_stage import StageDecision, StageGather, decide_stage, replay
from duet_vlm.runtime.prefill.positions import group_rotary
from duet_vlm.runtime.prefill.prediction_gradient import prediction_gradient
from duet_vlm.runtime.prefill.projection_reuse import ProjectionCache
from duet_vlm.runtime.prefill.token_stream import TokenStream
from duet_vlm.runtime.prompt import LayerGroup, PromptState
from duet_vlm.runtime.validation import check_finite

NAMES = {"scores": "the attention scores", "visual_self_attention": "the attention scores", "keys": "the keys"}


class PrefillPass:
    """One pass of a prompt through the decoder. Decisions are made once per layer and replayed if a layer runs again
    (checkpointing).

    Attributes
    ----------
    prompt_state : PromptState
        The prompt.
    kinds : list of str
        Type of each decoder layer.
    prepared_masks : Tensor or None
        4-D mask of full attention, where there is one; scoring ignores windows.
    stages : dict
        Layer -> visual tokens per sample that are kept before it.
    forced_stages : frozenset
        Layers before which the method decides although the number of tokens stays.
    stream : TokenStream or None
        The states of all tokens, of a method with re-entry.
    scorer : TextAttentionScorer or None
        Computes signals, if the method drops inside the decoder.
    scored_at : dict
        Stage -> layer whose attention ranks for it.
    layers_to_score : set of int
        Layers that have not been scored yet.
    needs_previous_hidden : set of int
        Stages that need the input of the layer before.
    needs_gradient : bool
        The method needs a prediction gradient.
    signals : dict
        Scored layer -> its signals, for the current tokens.
    previous_hidden : dict
        Stage -> input of the layer before it.
    projection_cache : ProjectionCache
        Projections that the scored layer reuses.
    stage_gathers : dict
        Stage -> the tokens that continue.
    rotaries, masks : dict
        Rotary tables and masks of later layer groups.
    rotary_calls : list
        Calls of the rotary embedding in half precision.
    entry_kwargs : dict
        Type of layer -> arguments of its first layer, for the tokens that entered.
    replay : dict
        Layer groups of an earlier pass to be replayed.
    """

    def __init__(
        self,
        prompt_state: PromptState,
        adapter: Adapter,
        cache: Any,
        queries: Tensor,
        num_queries: list[int],
        kwargs: dict[str, Any],
        replay: dict[Any, Any],
    ) -> None:
        self.prompt_state = prompt_state
        self.adapter = adapter
        self.reducer = prompt_state.config.reducer
        self.cache = cache
        self.replay = replay
        self.kinds = adapter.layer_types
        self.prepared_masks = _prepared_mask(kwargs.get("attention_mask")) if FULL in self.kinds else None
        self.stream = TokenStream() if self.reducer.reenters else None
        self.forced_stages = self.reducer.extra_stages(prompt_state.depth) | self._repeated_stages()
        self.stages: dict[int, list[int]] = {}
        for layer in range(prompt_state.depth):
            counts = self._stage_counts(layer)
            if counts is not None:
                self.stages[layer] = counts
        self._refuse_empty_prompt()
        self.scorer: TextAttentionScorer | None = None
        if isinstance(self.reducer, DecoderReducer):
            self.scorer = TextAttentionScorer(self.reducer, adapter, queries, num_queries, self.prepared_masks)
        self.scored_at = scoring_layers(adapter, self.reducer, [layer for layer in self.stages if self._chooses(layer)])
        prompt_state.record.num_queries = tuple(max(1, count) for count in num_queries)
        prompt_state.record.scored_layers = tuple(sorted(set(self.scored_at.values())))
        self.needs_gradient = Input.GRADIENT in self.reducer.requires
        ranking = {stage for stage in self.stages if stage not in replay and self._chooses(stage)}
        self.needs_previous_hidden = ranking if Input.PREVIOUS_HIDDEN_STATES in self.reducer.requires else set()
        self.layers_to_score = {scored for stage, scored in self.scored_at.items() if stage not in replay}
        self.signals: dict[int, Signals] = {}
        self.previous_hidden: dict[int, Tensor] = {}
        self.projection_cache = ProjectionCache()
        self.stage_gathers: dict[int, StageGather] = {}
        self.rotaries: dict[Any, Rotary] = {}
        self.masks: dict[Any, Any] = {}
        self.rotary_calls: list[Any] = []
        self.entry_kwargs: dict[str, dict[str, Any]] = {}

    def _repeated_stages(self) -> frozenset[int]:
        """With re-entry, stages at which other tokens may be awake, but not another number of them."""
        depth, entered = self.prompt_state.depth, self.prompt_state.num_visual(-1)
        first = next((layer for layer in range(depth) if self.prompt_state.num_visual(layer) != entered), depth)
        repeated = self.reducer.repeated_stages(depth, first)
        return frozenset(layer for layer in repeated if self.prompt_state.num_visual(layer) != entered)

    def _stage_counts(self, layer: int) -> list[int] | None:
        """Visual tokens per sample that are kept before ``layer``; None where there is no stage."""
        counts = self.prompt_state.num_visual(layer)
        return (
            counts
            if counts != self.prompt_state.num_visual(layer - 1) or (layer in self.forced_stages and any(counts))
            else None
        )

    def _chooses(self, stage: int) -> bool:
        """True if the method decides at ``stage``: not all tokens leave, nor do all that slept come back."""
        kept = self.prompt_state.num_prunable(stage)
        all_awake = self.stream is not None and kept == self.prompt_state.num_prunable(-1)
        return any(any(row) for row in kept) and not all_awake

    def _refuse_empty_prompt(self) -> None:
        """Refuse a prompt of visual tokens only, if all of them are dropped (without ``protect_predicting_tokens``)."""
        lengths = self.prompt_state.layer_groups[0].lengths
        entering = self.prompt_state.num_visual(-1)
        layers = (self.prompt_state.num_visual(layer) for layer in range(self.prompt_state.depth))
        remaining = [min(counts) for counts in zip(*layers, strict=True)]
        for sample, (length, entered, kept) in enumerate(zip(lengths, entering, remaining, strict=True)):
            if length and length - entered + kept == 0:
                raise ValueError(
                    f"sample {sample} has no token left in some layers of {self.reducer.name}'s schedule, and none that could predict: use "
                    "protect_predicting_tokens=True, or write text after the image"
                )

    def at_layer(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The input of ``layer``: score, drop tokens, and cut its arguments to the kept ones."""
        if (
            index == 0
            and self.reducer.options.text_query == "raters"
            and self.scorer is not None
            and self.scorer.raters is None
        ):
            with torch.no_grad():
                self.scorer.choose_raters(hidden.detach(), self.prompt_state.layer_groups[0].tokens.to(hidden.device))
        candidates = self._candidates(index, hidden)
        # this layer's attention, before the drop; with re-entry that of all tokens, for a later stage, too
        if self.scored_at.get(index) == index or self.stream is not None:
            self._score(index, layer, candidates, kwargs)
        if self.needs_gradient:
            self.entry_kwargs.setdefault(self.kinds[index], dict(kwargs))
        if index in self.stages:
            hidden = self._apply_stage(index, layer, candidates, kwargs)
        elif candidates is not hidden:
            self.projection_cache.keep(self.prompt_state.layer_group(index).tokens.entry_index)
        self._score(index, layer, hidden, kwargs)  # for a later stage, with the kept tokens
        if index + 1 in self.needs_previous_hidden:
            self.previous_hidden[index + 1] = hidden.detach()
        kwargs.update(self.layer_kwargs(self.prompt_state.layer_group(index), index, hidden, kwargs))
        return hidden

    def layer_kwargs(self, group: LayerGroup, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Changed arguments of layer ``index`` for the tokens of ``group``; ``kwargs`` are those for the tokens that
        entered."""
        if group is self.prompt_state.layer_groups[0]:
            return {}
        changed = {
            "position_embeddings": self._rotary(group, index, hidden, kwargs["position_embeddings"]),
            "attention_mask": self._mask(group, index, hidden, kwargs.get("attention_mask")),
        }
        if kwargs.get("position_ids") is not None:
            changed["position_ids"] = gather_last_dim(
                kwargs["position_ids"], group.tokens.entry_index.to(hidden.device)
            )
        return changed

    def reuses(self, index: int, layer: nn.Module) -> bool:
        """True if ``layer`` is scored and can reuse the keys of the scoring.

        Not with gradients, not in a compiled graph.
        """
        merges = index in self.stages and self.reducer.merges  # merged tokens need new keys
        return index in self.layers_to_score and not merges and not torch.is_grad_enabled() and compat.is_eager(layer)

    # ---- arguments of a layer

    def _rotary(self, group: LayerGroup, index: int, hidden: Tensor, rotary: Rotary) -> Rotary:
        """Rotary tables of the tokens of ``group``."""
        if group is self.prompt_state.layer_groups[0]:
            return rotary
        key = (group.first_layer, self.kinds[index])
        if key not in self.rotaries:
            tokens = group.tokens.to(rotary[0].device)
            self.rotaries[key] = group_rotary(
                self.adapter, hidden, rotary, tokens, self.prompt_state.positions, self.kinds[index]
            )
        return self.rotaries[key]

    def _exact_rotary(self, group: LayerGroup, index: int, hidden: Tensor, rotary: Rotary) -> Rotary:
        """The same for scoring: in float32, where the model's are half precision.

        With rounded tables scores depend on the padding.
        """
        for module, args, kwargs, output in self.rotary_calls:
            if output[0] is rotary[0]:
                exact = module.forward(args[0].float(), *args[1:], **kwargs)
                if group is self.prompt_state.layer_groups[0]:
                    return exact
                tokens = group.tokens.to(exact[0].device)
                return group_rotary(
                    self.adapter, hidden[..., :1].float(), exact, tokens, self.prompt_state.positions, self.kinds[index]
                )
        return self._rotary(group, index, hidden, rotary)

    def _rotary_from_zero(self, group: LayerGroup, index: int, hidden: Tensor, rotary: Rotary) -> Rotary | None:
        """Half-precision tables for positions that begin at 0 with each prompt, so that they are rounded as for the
        prompt alone.

        None where the model's tables are exact. Attention depends on distances only.
        """
        first = self.prompt_state.layer_groups[0]
        for module, args, kwargs, output in self.rotary_calls:
            if output[0] is rotary[0] and self.prompt_state.positions == "keep":
                positions = args[1] if len(args) > 1 else kwargs["position_ids"]
                valid = first.tokens.valid.to(positions.device)
                positions = positions.expand(*positions.shape[:-2], *valid.shape)
                first_position = valid.long().argmax(1, keepdim=True).expand(*positions.shape[:-1], 1)
                positions = (positions - positions.gather(-1, first_position)).clamp(min=0)
                new_args = (args[0], positions, *args[2:]) if len(args) > 1 else args
                output = module.forward(*new_args, **kwargs | ({} if len(args) > 1 else {"position_ids": positions}))
                return group_rotary(
                    self.adapter,
                    hidden,
                    output,
                    group.tokens.to(output[0].device),
                    self.prompt_state.positions,
                    self.kinds[index],
                )
        return None

    def _mask(self, group: LayerGroup, index: int, hidden: Tensor, mask: Any) -> Any:
        """Attention mask of the tokens of ``group``, prepared once."""
        key = (group.first_layer, self.kinds[index], id(mask))
        if key not in self.masks:
            self.masks[key] = (mask, self._new_mask(group, index, hidden, mask))  # holding the mask keeps its id unique
        return self.masks[key][1]

    def _new_mask(self, group: LayerGroup, index: int, hidden: Tensor, mask: Any) -> Any:
        """Prepare the attention mask of the tokens of ``group``."""
        if mask is None and not group.padded:  # nothing is hidden
            return None
        valid = group.tokens.valid.to(hidden.device)
        if self.kinds[index] == LINEAR:
            return valid.long() if group.padded else None
        if (
            isinstance(mask, Tensor)
            and mask.ndim == 4
            and (self.prepared_masks is not None or self.kinds[index] != FULL)
        ):
            return cut_mask(mask, group.tokens.entry_index.to(mask.device), group.tokens.valid.to(mask.device))
        return compat.decoder_mask(
            self.adapter.text_model.config, hidden, valid if group.padded else None, self.cache, index
        )

    def _candidates(self, index: int, hidden: Tensor) -> Tensor:
        """The states among which a stage before layer ``index``, or a ranking in it, looks: those of the layer's input,
        or with re-entry of all tokens."""
        if self.stream is None:
            return hidden
        awake = self.prompt_state.layer_group(index - 1)
        if index in self.stages:
            if index in self.stage_gathers:
                self.stream.check_runs_again(index)
            return self.stream.at_stage(index, hidden, awake)
        return self.stream.joined(hidden, awake) if index in self.layers_to_score else hidden

    # ---- scoring

    def _score(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Store the signals of a layer that is to be scored."""
        if index in self.layers_to_score:
            with torch.no_grad():
                self.signals[index] = self._signals(index, layer, hidden, kwargs)
            self.layers_to_score.remove(index)

    def _signals(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Signals:
        """The signals of ``layer`` for the current tokens."""
        assert self.scorer is not None
        group = self.prompt_state.layer_group(-1 if self.stream is not None else index)
        rotary = self._exact_rotary(group, index, hidden, kwargs["position_embeddings"])
        num_visual = max(
            self.prompt_state.num_visual(-1 if group is self.prompt_state.layer_groups[0] else group.first_layer)
        )
        linear = self.kinds[index] == LINEAR
        signals = self.scorer.signals(
            layer, hidden.detach(), group.tokens.to(hidden.device), rotary, num_visual, linear
        )
        self.projection_cache.recording = False
        if self.adapter.key_projection(layer) in self.projection_cache.by_module:
            self.prompt_state.record.reused_layers = (*self.prompt_state.record.reused_layers, index)
        for name, rows in signals.items():
            self.prompt_state.pending.finite.append((compat.finite(rows), f"{NAMES[name]} at decoder layer {index}"))
            check_finite(*self.prompt_state.pending.finite[-1])
        return {name: rows.to(hidden.device) for name, rows in signals.items()}

    # ---- dropping

    def _apply_stage(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Hidden states after the stage before layer ``index``; decided once."""
        if index not in self.stage_gathers:
            with compat.without_autocast(hidden):
                self.stage_gathers[index] = self._decide(index, layer, hidden, kwargs)
            self.projection_cache.keep(self.stage_gathers[index].index)
        with compat.without_autocast(hidden):
            return self.stage_gathers[index].rows_of(hidden)

    def _decide(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> StageGather:
        """Decide the stage before layer ``index``; opens the layer group of the kept tokens."""
        source = self.prompt_state.candidate_layer(index)
        group = self.prompt_state.layer_group(source)
        tokens = group.tokens.to(hidden.device)
        num_visual = self.prompt_state.num_visual(source)
        lengths = tuple(
            length - before + kept
            for length, before, kept in zip(group.lengths, num_visual, self.stages[index], strict=True)
        )
        num_prunable = self.prompt_state.num_prunable(source)
        if index in self.replay:
            decision = replay(self.replay[index], tokens, self.prompt_state.prompt_len, max(map(sum, num_prunable)))
        elif self._chooses(index):
            decision = self._method_decision(index, layer, hidden, kwargs, tokens)
        else:
            all_awake = any(map(sum, self.prompt_state.num_prunable(index)))
            decision = StageDecision(tokens.prunable if all_awake else torch.zeros_like(tokens.visual))
        keep = (tokens.valid & ~tokens.prunable) | decision.kept
        gather = StageGather.of(decision, keep, max(lengths), in_order=self.prompt_state.positions == "keep")
        kept_tokens = tokens.gather(gather.index, gather.valid)
        self.prompt_state.layer_groups.append(
            LayerGroup(index, kept_tokens, lengths, decision.by_prompt_position(tokens))
        )
        self.replay.setdefault(index, self.prompt_state.layer_groups[-1])
        later = {scored for stage, scored in self.scored_at.items() if stage > index}
        self.signals = {scored: signals for scored, signals in self.signals.items() if scored in later}
        if self.stream is None:  # else a later stage, too, is among all tokens
            self.signals = {
                scored: {name: gather_rows(rows, gather.index) for name, rows in signals.items()}
                for scored, signals in self.signals.items()
            }
        self.previous_hidden.pop(index, None)
        return gather

    def _method_decision(
        self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any], tokens: TokenMap
    ) -> StageDecision:
        """The method's decision for the stage before layer ``index``."""
        reducer = self.reducer
        assert isinstance(reducer, DecoderReducer) and self.scorer is not None
        signals = dict(self.signals.get(self.scored_at.get(index, -1), {}))
        if reducer.requires & {Input.HIDDEN_STATES, Input.TEXT_HIDDEN_STATES}:
            signals["hidden_states"] = hidden.detach()
        if Input.PREVIOUS_HIDDEN_STATES in reducer.requires:
            signals["previous_hidden_states"] = self.previous_hidden[index].to(hidden.device)
        if Input.GRADIENT in reducer.requires:
            signals["gradient"] = self._gradient(index, layer, hidden, kwargs, tokens)
        with torch.no_grad():
            return decide_stage(self.prompt_state, self.scorer, index, tokens, signals)

    def _gradient(
        self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any], tokens: TokenMap
    ) -> Tensor:
        """Gradient of a prediction by the hidden states before ``layer``."""
        reducer = self.reducer
        assert isinstance(reducer, DecoderReducer)
        last = reducer.scoring_rules().probe == "last"
        number = self.adapter.probed_layer(index, last)
        gradient_layer = layer if number == index else self.adapter.layers[number]
        group = self.prompt_state.layer_group(self.prompt_state.candidate_layer(index))
        layer_args = self._arguments_of(group, number, hidden, kwargs, index) | {
            "past_key_values": None,
            "use_cache": False,
        }
        tables = self._rotary_from_zero(
            group, number, hidden, self.entry_kwargs.get(self.kinds[number], kwargs)["position_embeddings"]
        )
        if tables is not None:
            layer_args["position_embeddings"] = tables
        num_certain = self.prompt_state.prompt_len - self.prompt_state.record.drafts
        predicting = tokens.valid & (tokens.prompt_index < num_certain)
        return prediction_gradient(self.adapter, gradient_layer, hidden, predicting, layer_args, reducer.name, last)

    def _arguments_of(
        self, group: LayerGroup, number: int, hidden: Tensor, kwargs: dict[str, Any], index: int
    ) -> dict[str, Any]:
        """Arguments of layer ``number`` for the tokens of ``group``, where layer ``index`` has ``kwargs``; the tables
        depend on the type of layer."""
        kind = self.kinds[number]
        entry_kwargs = kwargs if kind == self.kinds[index] else self.entry_kwargs.get(kind, kwargs)
        layer_args = entry_kwargs | self.layer_kwargs(group, number, hidden, entry_kwargs)
        if kind == self.kinds[index] or kind in self.entry_kwargs:
            return layer_args
        valid = group.tokens.valid.to(hidden.device)  # no layer of this type has run yet
        if self.prepared_masks is not None:
            device = self.prepared_masks.device
            return layer_args | {
                "attention_mask": cut_mask(self.prepared_masks, group.tokens.entry_index.to(device), valid.to(device))
            }
        config = self.adapter.text_model.config
        return layer_args | {
            "attention_mask": compat.decoder_mask(config, hidden, valid if group.padded else None, None, number)
        }


def scoring_layers(adapter: Adapter, reducer: Reducer, stages: list[int]) -> dict[int, int]:
    """For each stage the layer whose attention ranks its tokens: the method's choice, or the last one before it that
    has attention.

    Raises
    ------
    ValueError
        If there is no such layer, or none with a gradient.
    """
    if not isinstance(reducer, DecoderReducer):
        return {}
    if Input.GRADIENT in reducer.requires:
        _check_gradient_layers(adapter, reducer, stages)
    if not reducer.uses_attention():
        return {}
    scored = {
        stage: adapter.ranking_layer(stage - reducer.score_layer_offset, reducer.score_states) for stage in stages
    }
    for stage, layer in scored.items():
        if layer < 0:
            lowest = adapter.first_attention + reducer.score_layer_offset
            raise ValueError(
                f"{reducer.name} drops before decoder layer {stage}, but {adapter.family} has no attention to rank tokens by before layer "
                f"{adapter.first_attention}: drop before layer {lowest} or later"
            )
    return scored


def _check_gradient_layers(adapter: Adapter, reducer: DecoderReducer, stages: list[int]) -> None:
    """Refuse stages before which no layer has a gradient."""
    probes_last = reducer.scoring_rules().probe == "last"
    for stage in stages:
        if adapter.probed_layer(stage, probes_last) < 0:
            direction = "before" if probes_last else "from there on"
            remedy = f"from layer {adapter.first_attention + 1} on" if probes_last else "earlier"
            raise ValueError(
                f"{reducer.name} drops before decoder layer {stage}, but {adapter.family} has no attention {direction} that a gradient can go through: "
                f"drop {remedy}"
            )


def _prepared_mask(mask: Any) -> Tensor | None:
    """The 4-D mask of full attention, where the caller or the family prepared one."""
    if isinstance(mask, dict):
        mask = mask.get(FULL)
    return mask if isinstance(mask, Tensor) and mask.ndim == 4 else None
