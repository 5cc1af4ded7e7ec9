"""State of a reduced prompt for decoding.

It is stored on the KV cache, follows its reordering, and ends with its contents.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import FULL, LINEAR, SLIDING, Adapter, Rotary
from duet_vlm.ops.ragged import upload
from duet_vlm.planning.budget import SpanPlan
from duet_vlm.planning.tokens import Selection, Span, TokenMap
from duet_vlm.runtime import compat
from duet_vlm.runtime.active_config import ActiveConfig
from duet_vlm.runtime.prefill import masks


@dataclass(eq=False)
class LayerGroup:
    """Decoder layers that process the same tokens.

    Attributes
    ----------
    first_layer : int
        The group begins here and ends where the next one begins.
    tokens : TokenMap
        The tokens, [B, T].
    lengths : tuple of int
        Valid tokens per sample, known on the host.
    merged_into : Selection or None
        The selection before ``first_layer``, where tokens were merged, with prompt positions instead of token numbers.
    """

    first_layer: int
    tokens: TokenMap
    lengths: tuple[int, ...]
    merged_into: Selection | None = None

    @property
    def width(self) -> int:
        return self.tokens.prompt_index.shape[1]

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.width


@dataclass(frozen=True)
class ProtectedCount:
    """Visual tokens that are always kept, since their logits predict.

    Attributes
    ----------
    in_sequence : int
        How many there are.
    beyond_plan : int
        How many of them the encoder stage had dropped.
    """

    in_sequence: int = 0
    beyond_plan: int = 0


@dataclass(frozen=True)
class RankingGroup:
    """Spans of one sample whose visual tokens are ranked together, and the number of their protected tokens."""

    plans: tuple[SpanPlan, ...]
    protected: ProtectedCount = ProtectedCount()

    def num_alive(self, layer: int) -> int:
        """Visual tokens at the input of ``layer``; -1: those that entered the decoder."""
        planned = sum(plan.entry if layer < 0 else plan.counts[layer] for plan in self.plans)
        return max(planned + self.protected.beyond_plan, self.protected.in_sequence)

    def num_prunable(self, layer: int) -> int:
        """The same without the protected ones."""
        return self.num_alive(layer) - self.protected.in_sequence


@dataclass
class PromptState:
    """One prompt: its spans, the tokens of each layer, and the position of the next token. Plain data; no modules, no cache.

    Attributes
    ----------
    config : ActiveConfig
        Method and budget.
    prompt_len : int
        Length of the prompt as sent.
    spans : tuple of tuple of Span
        Per sample.
    ranking_groups : tuple of tuple of RankingGroup
        Per sample.
    prompt : TokenMap
        The tokens of the prompt as sent.
    sources : tuple of (EncodedFeatures, int)
        Per span, in order: its encoder call and its number in it.
    num_text_after_image : int
        The smallest number of tokens of a sample after its last visual token.
    drafts : int
        Tokens at the prompt's end that assisted decoding guessed.
    layer_groups : list of LayerGroup
        The first one is the sequence that entered the decoder.
    num_queries : tuple of int
        Per sample, text queries.
    scored_layers : tuple of int
        Layers whose attention scored tokens.
    reused_layers : tuple of int
        Those of them that reused the keys of the scoring.
    element_bytes : int
        Bytes of one number of the hidden states.
    num_real_tokens : Tensor or None
        [B] tokens of each sample without padding.
    next_position : Tensor or None
        [B] or [3, B] position of the first generated token.
    reduces : bool
        Any token is dropped.
    trimmed_layers : tuple of int
        Layers whose cache was cut to the tokens of the last group.
    rows_evicted_elsewhere : tuple of int
        Per layer, cache rows that other code (cache compression) removed during the prefill; empty if none.
    cache_bytes : tuple of int or None
        Per layer, measured after the prefill.
    finite : list of (Tensor, str)
        Flags that scores are finite, and their description for the error.
    invalid_code : list of Tensor
        Codes of what the method returned at the decoder stages.
    num_decoded : int
        Tokens processed after the prompt.
    """

    config: ActiveConfig
    prompt_len: int
    spans: tuple[tuple[Span, ...], ...]
    ranking_groups: tuple[tuple[RankingGroup, ...], ...]
    prompt: TokenMap
    sources: tuple[tuple[Any, int], ...] = ()
    num_text_after_image: int = 0
    drafts: int = 0
    layer_groups: list[LayerGroup] = field(default_factory=list)
    num_queries: tuple[int, ...] = ()
    scored_layers: tuple[int, ...] = ()
    reused_layers: tuple[int, ...] = ()
    element_bytes: int = 4
    num_real_tokens: Tensor | None = None
    next_position: Tensor | None = None
    reduces: bool = False
    trimmed_layers: tuple[int, ...] = ()
    rows_evicted_elsewhere: tuple[int, ...] = ()
    cache_bytes: tuple[int, ...] | None = None
    finite: list[tuple[Tensor, str]] = field(default_factory=list)
    invalid_code: list[Tensor] = field(default_factory=list)
    num_decoded: int = 0

    @property
    def depth(self) -> int:
        return self.config.depth

    @property
    def positions(self) -> str:
        return self.config.reducer.positions

    @property
    def plans(self) -> tuple[tuple[SpanPlan, ...], ...]:
        """Per sample, the plans of its spans."""
        return tuple(tuple(plan for group in row for plan in group.plans) for row in self.ranking_groups)

    def visual(self, layer: int) -> list[int]:
        """Visual tokens per sample at the input of ``layer``; -1: those that entered the decoder."""
        return [sum(group.num_alive(layer) for group in row) for row in self.ranking_groups]

    def ranked(self, layer: int) -> list[list[int]]:
        """As ``visual``, by ranking group and without protected tokens."""
        return [[group.num_prunable(layer) for group in row] for row in self.ranking_groups]

    def layer_group(self, layer: int) -> LayerGroup:
        """The group that ``layer`` belongs to."""
        return next(group for group in reversed(self.layer_groups) if group.first_layer <= layer)

    def cache_len(self, layer: int) -> LayerGroup:
        """The layer group whose tokens the cache of ``layer`` holds."""
        return self.layer_groups[-1] if layer in self.trimmed_layers else self.layer_group(layer)

    def cache_rows(self, layer: int) -> int:
        """Number of rows of the prompt in the cache of ``layer``."""
        return self.cache_len(layer).width - (self.rows_evicted_elsewhere[layer] if self.rows_evicted_elsewhere else 0)


class PrunedCacheMixin:
    """Mixed into the class of one cache by ``bind_prompt``: connects its batch rows with the samples of a prompt.

    Attributes
    ----------
    duet_prompt_state : PromptState
        The prompt.
    duet_order : Tensor or None
        [rows] sample number of each batch row; None as long as row b is sample b.
    """

    layers: list[Any]
    duet_prompt_state: PromptState
    duet_order: Tensor | None
    _plain: Any

    @property
    def is_compileable(self) -> bool:
        """False: generate() would compile the model with its hooks and prepare masks of the unreduced length."""
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._reorder(self._sample_numbers(self.duet_prompt_state.prompt.prompt_index.device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens after the last visual one, or all of them: before that, the layers hold different tokens."""
        held = int(self.get_seq_length())  # type: ignore[attr-defined]
        removed = abs(int(tokens_to_remove))
        generated = held - self.duet_prompt_state.cache_rows(self._first_filled_layer())
        removable = generated + self.duet_prompt_state.num_text_after_image
        if removable < removed < held:
            raise ValueError(
                f"crop({tokens_to_remove}) would cut into the visual tokens of a reduced prompt, of which each layer holds others: remove at "
                f"most {removable} tokens, or begin anew with cache.reset()"
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        unbind_prompt(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _copy_target, (self._plain,), self.__dict__

    def _first_filled_layer(self) -> int:
        """The first layer with keys."""
        return next(index for index, layer in enumerate(self.layers) if getattr(layer, "keys", None) is not None)

    def _sample_numbers(self, device: torch.device) -> Tensor:
        """[rows] sample number of each batch row."""
        return torch.arange(len(self.duet_prompt_state.spans), device=device) if self.duet_order is None else self.duet_order

    def _reorder(self, index: Tensor) -> None:
        self.duet_order = self._sample_numbers(index.device)[index]


@functools.lru_cache(maxsize=64)
def _pruned_class(original: Any) -> Any:
    """A subclass of a cache class that keeps the prompt state; same name."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__, "_plain": original}
    return type(original.__name__, (PrunedCacheMixin, original), names)


def _copy_target(original: Any) -> Any:
    """A new instance for copies and pickles, which cannot import a class that was made at run time."""
    cls = _pruned_class(original)
    return cls.__new__(cls)


def bind_prompt(cache: Any, prompt_state: PromptState) -> None:
    """Connect ``cache`` with the prompt that fills it."""
    if not isinstance(cache, PrunedCacheMixin):
        cache.__class__ = _pruned_class(cache.__class__)
    cache.duet_prompt_state = prompt_state
    cache.duet_order = None


def trim_cache(cache: Any, prompt_state: PromptState, kinds: list[str]) -> None:
    """Remove from the cache of earlier layers the visual tokens that did not reach the last layer.

    Sliding layers keep their window, linear ones their state.

    Raises
    ------
    ValueError
        If a layer does not hold its keys and values as they are (quantised caches).
    """
    last = prompt_state.layer_groups[-1]
    for index, kind in enumerate(kinds):
        group = prompt_state.layer_group(index)
        if kind != FULL or group is last:
            continue
        zeros = torch.zeros(len(group.tokens.prompt_index), prompt_state.prompt_len, dtype=torch.long, device=group.tokens.prompt_index.device)
        index_of_position = zeros.scatter(1, group.tokens.prompt_index, torch.arange(group.width, device=zeros.device).expand_as(group.tokens.prompt_index))
        compat.keep_cached(cache, index, group.width, index_of_position.gather(1, last.tokens.prompt_index.to(zeros.device)))
        prompt_state.trimmed_layers = (*prompt_state.trimmed_layers, index)


def record_evicted(cache: Any, prompt_state: PromptState, kinds: list[str]) -> None:
    """Record how many rows of each layer other code removed (cache compression by hooks on attention)."""
    num_missing = (prompt_state.cache_len(index).width - int(cache.get_seq_length(index)) if kind == FULL else 0 for index, kind in enumerate(kinds))
    evicted = tuple(max(0, rows) for rows in num_missing)
    prompt_state.rows_evicted_elsewhere = evicted if any(evicted) else ()


def static_copy(adapter: Adapter, cache: Any, num_new: int) -> Any:
    """A static copy of ``cache`` with room for ``num_new`` more tokens in each layer; see ``Handle.static_cache``."""
    if isinstance(num_new, bool) or not isinstance(num_new, int) or num_new < 1:
        raise ValueError(f"max_new_tokens={num_new!r}: how many tokens may still be written, a whole number from 1 on")
    other = sorted(set(adapter.layer_types) - {FULL})
    if other:
        kinds = ", ".join(other)
        raise ValueError(f"static caches are made of layers with full attention, and {adapter.family} has others ({kinds}): use a dynamic cache")
    if not compat.makes_masks(adapter.text_model.config):
        raise ValueError("static caches hold rows that are not written yet, which a mask must hide: load the model with sdpa or eager attention")
    static = compat.fixed_cache(cache, num_new)
    if isinstance(cache, PrunedCacheMixin):
        bind_prompt(static, cache.duet_prompt_state)
        static.duet_order = cache.duet_order
    return static


def unbind_prompt(cache: Any) -> None:
    """Make ``cache`` an ordinary one again."""
    if isinstance(cache, PrunedCacheMixin):
        del cache.duet_prompt_state, cache.duet_order
        cache.__class__ = cache._plain


class DecodePass:
    """One later call on a reduced prompt: a decode step, a few draft tokens, or the next turn's text.

    Attributes
    ----------
    prompt_state : PromptState
        The prompt in the cache.
    batch, num_new : int
        Shape of the new tokens.
    reference_group : LayerGroup
        The layers whose mask the stock code derives from the mask that it gets.
    num_generated : int
        Tokens after the prompt in the cache; negative where rejected draft tokens of the prompt were cut off.
    static_capacity : int
        Tokens after the prompt that a static cache has room for; negative for a growing cache.
    new_token_mask : Tensor or None
        The caller's mask of the tokens after the prompt.
    steps : Tensor
        [new] or [B, new] distance of each new token from the first position after the prompt.
    window : int or None
        Size of the sliding window.
    windowed : bool
        The window hides tokens.
    needs_no_mask : bool
        Layers need no mask as long as the reference group has none: one query, no padding, original positions.
    """

    def __init__(self, adapter: Adapter, cache: PrunedCacheMixin, mask: Any, kwargs: dict[str, Any]) -> None:
        prompt_state = cache.duet_prompt_state
        self.prompt_state = prompt_state
        self.adapter = adapter
        self.cache = cache
        embeds = kwargs["inputs_embeds"]
        self.batch, self.num_new = embeds.shape[:2]
        self.device = embeds.device
        self.reference_group = prompt_state.cache_len(adapter.first_attention)
        self.num_generated = int(cache.get_seq_length()) - prompt_state.cache_rows(adapter.first_attention)  # type: ignore[attr-defined]
        self.static_capacity = compat.capacity(cache, adapter.first_attention) - self.reference_group.width
        num_written = self.num_generated + self.num_new
        if 0 <= self.static_capacity < num_written:
            raise ValueError(
                f"this static cache has room for {self.static_capacity} tokens after its prompt, and {num_written} are written: make it larger"
            )
        self.new_token_mask = self._mask_of_new_tokens(mask)
        self._refuse_compressed()
        self.steps = self._relative_positions(mask)
        self.kinds = adapter.layer_types
        self.window = adapter.text_model.config.sliding_window if SLIDING in self.kinds else None
        # a window that reaches back to the first position hides nothing
        self.windowed = self.window is not None and prompt_state.prompt_len + self.num_generated + self.num_new > self.window
        padded = any(group.padded for group in prompt_state.layer_groups)
        self.needs_no_mask = self.num_new == 1 and prompt_state.positions == "keep" and not self.windowed and not padded
        self.masks: dict[Any, Any] = {}
        self.rotaries: dict[Any, Rotary] = {}
        kwargs["position_ids"] = self._positions(prompt_state.layer_groups[0])
        kwargs["attention_mask"] = self._decoder_argument_mask(mask, kwargs["attention_mask"], embeds)

    def _mask_of_new_tokens(self, mask: Any) -> Tensor | None:
        """The part of the caller's mask that covers tokens after the prompt, None if the caller gave no mask."""
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise ValueError("decoding on a reduced cache takes a 2-D attention mask or none; prepared 4-D masks have the unreduced length")
        expected = self.prompt_state.prompt_len + self.num_generated + self.num_new
        if mask.shape[1] != expected:
            raise ValueError(
                f"attention_mask covers {mask.shape[1]} tokens and {self.num_new} new ones were passed, but the reduced cache represents "
                f"{self.prompt_state.prompt_len + self.num_generated} tokens. To continue a conversation pass only the new token ids (the last sampled one "
                "included) with the mask of the whole conversation."
            )
        return mask[:, self.prompt_state.prompt_len :].bool()

    def _in_cache_order(self, x: Tensor, dim: int = 0) -> Tensor:
        """``x`` of the prompt's samples in the order of the cache's batch rows."""
        order = self.cache.duet_order
        return self._repeat_for_batch(x if order is None else x.index_select(dim, order.to(x.device)), dim)

    def _repeat_for_batch(self, x: Tensor, dim: int = 0) -> Tensor:
        """``x`` repeated for the batch, where the caller repeated the prompts."""
        return x if x.shape[dim] == self.batch else x.repeat_interleave(self.batch // x.shape[dim], dim)

    def _refuse_compressed(self) -> None:
        """Refuse padding and windows with a cache that other code compressed: the validity of its rows is unknown."""
        if not self.prompt_state.rows_evicted_elsewhere:
            return
        windowed = SLIDING in self.adapter.layer_types
        padded = any(group.padded for group in self.prompt_state.layer_groups)
        if windowed or padded or (self.new_token_mask is not None and not bool(self.new_token_mask.all())):
            raise ValueError(
                "the cache of this reduced prompt was compressed by others, and which of its rows are padding or inside a window is not known "
                "any more: send prompts without padding, one at a time or of equal length, to a decoder without sliding layers"
            )
        self.new_token_mask = None

    def _relative_positions(self, mask: Tensor | None) -> Tensor:
        """Distance of each new token from the first position after the prompt: [new] or [B, new].

        Masked tokens do not count.
        """
        if mask is None:
            return torch.arange(self.num_new, device=self.device) + self.num_generated
        assert self.prompt_state.num_real_tokens is not None
        num_prompt_tokens = self._in_cache_order(self.prompt_state.num_real_tokens).to(self.device)
        return self._repeat_for_batch(mask).to(self.device).long().cumsum(1)[:, -self.num_new :] - 1 - num_prompt_tokens[:, None]

    def _positions(self, group: LayerGroup) -> Tensor:
        """Position ids of the new tokens in the layers of ``group``."""
        if self.prompt_state.positions == "compact" and group is not self.prompt_state.layer_groups[0]:
            start = upload(group.lengths, self.device)
        else:
            assert self.prompt_state.next_position is not None
            start = self.prompt_state.next_position.to(self.device)
        return (self._in_cache_order(start, start.ndim - 1)[..., None] + self.steps).clamp(min=0)

    def _mask_2d(self, group: LayerGroup) -> Tensor | None:
        """[B, keys] bool of cached and new tokens in the layers of ``group``; None where all are valid."""
        if self.new_token_mask is None and not group.padded and self.static_capacity < 0:
            return None
        valid = self._in_cache_order(group.tokens.valid)
        keys = group.width + self.num_generated + self.num_new  # fewer than in the prompt where rejected draft tokens were cut off
        if self.new_token_mask is None:
            new_tokens = valid.new_ones(self.batch, max(0, self.num_generated + self.num_new))
        else:
            new_tokens = self._repeat_for_batch(self.new_token_mask)
        return torch.cat([valid, new_tokens], 1)[:, :keys]

    def _decoder_argument_mask(self, mask: Any, given: Any, embeds: Tensor) -> Any:
        """The mask argument of the stock decoder.

        A 2-D mask, from which it prepares its own; or, where the family has prepared ``given`` from the caller's
        ``mask`` before, the same prepared for the cached tokens.
        """
        mask_2d = self._mask_2d(self.reference_group)
        grows = self.static_capacity < 0  # else unwritten rows have to be hidden, which a 2-D mask cannot do
        if grows and (mask is None or (isinstance(given, Tensor) and given.ndim == 2)):
            return mask_2d
        kinds = given if isinstance(given, dict) else {FULL: given}
        if grows and not self.reference_group.padded and all(prepared is None for prepared in kinds.values()):  # it hides nothing
            return None
        prepared = compat.decoder_mask(self.adapter.text_model.config, embeds, mask_2d, self.cache, self.adapter.first_attention)
        return dict.fromkeys(kinds, prepared) if isinstance(given, dict) else prepared  # windowed layers get theirs in at_layer

    def at_layer(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Set the mask of ``layer`` and, with renumbered positions, its rotary table."""
        if self.needs_no_mask and kwargs.get("attention_mask") is None:  # the model found that the caller's mask hides nothing
            return hidden
        group, cached, kind = self.prompt_state.layer_group(index), self.prompt_state.cache_len(index), self.kinds[index]
        if self.prompt_state.positions == "compact" and group is not self.prompt_state.layer_groups[0]:
            key = (group.first_layer, kind)
            if key not in self.rotaries:
                self.rotaries[key] = self.adapter.rotary(hidden, self._positions(group).to(hidden.device), kind)
            kwargs["position_embeddings"] = self.rotaries[key]
        windowed = self.windowed and kind == SLIDING
        if kind != LINEAR and (windowed or cached is not self.reference_group):
            mask_key = (cached.first_layer, windowed)
            if mask_key not in self.masks:
                self.masks[mask_key] = self._window_mask(cached, index, hidden) if windowed else self._mask(cached, index, hidden)
            kwargs["attention_mask"] = self.masks[mask_key]
        return hidden

    def _mask(self, group: LayerGroup, index: int, hidden: Tensor) -> Any:
        """The mask of a layer with full attention."""
        mask = self._mask_2d(group)
        one_query = mask is None and self.num_new == 1  # one query sees every key: no mask in any implementation
        return None if one_query else compat.decoder_mask(self.adapter.text_model.config, hidden, mask, self.cache, index)

    def _window_mask(self, group: LayerGroup, index: int, hidden: Tensor) -> Any:
        """The mask of a sliding layer: windows count positions of the original prompt.

        The cache holds the last keys only.
        """
        config, keys = self.adapter.text_model.config, compat.cached_rows(self.cache, index) + self.num_new
        if not compat.makes_masks(config):  # such kernels apply the window themselves
            return self._mask(group, index, hidden)
        rejected = max(0, -self.num_generated)  # draft tokens of the prompt that were cut off
        new_positions = torch.arange(self.num_generated + rejected + self.num_new, device=hidden.device) + self.prompt_state.prompt_len - rejected
        positions = self._in_cache_order(group.tokens.prompt_index)[:, : group.width - rejected]
        positions = torch.cat([positions, new_positions.expand(self.batch, -1)], 1)
        mask = self._mask_2d(group)
        mask = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask
        assert self.window is not None
        return compat.prepared_mask(config, hidden, masks.window(mask[:, -keys:], positions[:, -keys:], self.num_new, self.window))
