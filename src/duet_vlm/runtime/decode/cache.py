"""What decoding needs to know about a reduced prompt. It lives on the cache, follows what is done to it, and dies with its rows."""

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
    """Decoder layers from ``first_layer`` on that see the same rows; ``lengths`` are the real rows per sample, known on the host.

    ``merged``: what became of the visual rows in front of ``first_layer`` where some were merged, with prompt slots in place of token numbers.
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
    """Visual rows that never leave, since they predict: ``rows`` of them, ``added`` of which the method had left out."""

    in_sequence: int = 0
    beyond_plan: int = 0


@dataclass(frozen=True)
class RankingGroup:
    """Spans of one sample whose visual tokens are ranked together, and what of them stays in any case."""

    plans: tuple[SpanPlan, ...]
    protected: ProtectedCount = ProtectedCount()

    def num_alive(self, layer: int) -> int:
        """Visual rows at the input of ``layer``; -1: those that entered."""
        planned = sum(plan.entry if layer < 0 else plan.counts[layer] for plan in self.plans)
        return max(planned + self.protected.beyond_plan, self.protected.in_sequence)

    def num_prunable(self, layer: int) -> int:
        """Those of them that a method chose, or that simply are still there."""
        return self.num_alive(layer) - self.protected.in_sequence


@dataclass
class PromptState:
    """One prompt: its spans, what each layer saw, and where decoding goes on. Plain data; no modules, no cache.

    ``rows`` is the prompt's length as sent; ``groups[0]`` is the sequence that entered the decoder, ``group(l)`` what layer l reads.
    ``after`` is the least number of rows of a sample behind its last visual one, ``drafts`` how many at the prompt's end assisted decoding guessed.
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
    reused_layers: tuple[int, ...] = ()  # those of them that took over the keys they were ranked by
    element_bytes: int = 4
    num_real_tokens: Tensor | None = None  # [B] rows of each sample that are no padding
    next_position: Tensor | None = None
    reduces: bool = False
    trimmed_layers: tuple[int, ...] = ()  # layers whose cache holds the rows of the last group only
    rows_evicted_elsewhere: tuple[int, ...] = ()  # rows by layer that others took out of the cache while the prompt was read; empty where nobody did
    cache_bytes: tuple[int, ...] | None = None
    finite: list[tuple[Tensor, str]] = field(default_factory=list)
    invalid_code: list[Tensor] = field(default_factory=list)  # codes of what the method returned at its drops
    num_decoded: int = 0

    @property
    def depth(self) -> int:
        return self.config.depth

    @property
    def positions(self) -> str:
        return self.config.reducer.positions

    @property
    def plans(self) -> tuple[tuple[SpanPlan, ...], ...]:
        """Of the spans of each sample."""
        return tuple(tuple(plan for pool in row for plan in pool.plans) for row in self.ranking_groups)

    def visual(self, layer: int) -> list[int]:
        """Visual rows per sample at the input of ``layer``; -1: those that entered."""
        return [sum(pool.num_alive(layer) for pool in row) for row in self.ranking_groups]

    def ranked(self, layer: int) -> list[list[int]]:
        """As ``visual``, by pool and without the rows that stay in any case."""
        return [[pool.num_prunable(layer) for pool in row] for row in self.ranking_groups]

    def layer_group(self, layer: int) -> LayerGroup:
        """The group that ``layer`` belongs to."""
        return next(g for g in reversed(self.layer_groups) if g.first_layer <= layer)

    def cache_len(self, layer: int) -> LayerGroup:
        """The rows that the cache of ``layer`` holds."""
        return self.layer_groups[-1] if layer in self.trimmed_layers else self.layer_group(layer)

    def cache_rows(self, layer: int) -> int:
        """How many rows of the prompt the cache of ``layer`` holds."""
        return self.cache_len(layer).width - (self.rows_evicted_elsewhere[layer] if self.rows_evicted_elsewhere else 0)


class PrunedCacheMixin:
    """Mixed into the class of one cache (``follow``): the run that its rows belong to, and which of the run's samples each row is.

    ``duet_order`` is None as long as every row is the sample of its number, else [rows] long.
    """

    layers: list[Any]
    duet_prompt_state: PromptState
    duet_order: Tensor | None
    _plain: Any

    @property
    def is_compileable(self) -> bool:
        """Not by generate(), which would compile the model with its hooks and prepare masks of the unreduced length."""
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._reorder(self._rows(self.duet_prompt_state.prompt.prompt_index.device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back rows behind the last visual one, or all of them: the layers hold different rows of what is between."""
        held, removed = int(self.get_seq_length()), abs(int(tokens_to_remove))  # type: ignore[attr-defined]
        said = held - self.duet_prompt_state.cache_rows(self._home())
        if said + self.duet_prompt_state.num_text_after_image < removed < held:
            raise ValueError(
                f"crop({tokens_to_remove}) would cut into the visual tokens of a reduced prompt, of which each layer holds others: remove at "
                f"most {said + self.duet_prompt_state.num_text_after_image} tokens, or begin anew with cache.reset()"
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        unbind_prompt(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _again, (self._plain,), self.__dict__

    def _home(self) -> int:
        return next(index for index, layer in enumerate(self.layers) if getattr(layer, "keys", None) is not None)

    def _rows(self, device: torch.device) -> Tensor:
        return torch.arange(len(self.duet_prompt_state.spans), device=device) if self.duet_order is None else self.duet_order

    def _reorder(self, index: Tensor) -> None:
        self.duet_order = self._rows(index.device)[index]


@functools.lru_cache(maxsize=64)
def _followed(plain: Any) -> Any:
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__, "_plain": plain}
    return type(plain.__name__, (PrunedCacheMixin, plain), names)


def _again(plain: Any) -> Any:
    """For copies and pickles, which find no class that was made on the fly."""
    cls = _followed(plain)
    return cls.__new__(cls)


def bind_prompt(cache: Any, run: PromptState) -> None:
    """From now on ``cache`` knows that its rows are those of ``run``."""
    if not isinstance(cache, PrunedCacheMixin):
        cache.__class__ = _followed(cache.__class__)
    cache.duet_prompt_state, cache.duet_order = run, None


def trim_cache(cache: Any, run: PromptState, kinds: list[str]) -> None:
    """Earlier layers forget the visual tokens that did not reach the last one. Sliding layers keep what their window holds, linear ones a state.

    Raises
    ------
    ValueError
        If a layer does not hold its keys and values as they are (quantised caches).
    """
    last = run.layer_groups[-1]
    for index, kind in enumerate(kinds):
        group = run.layer_group(index)
        if kind != FULL or group is last:
            continue
        slots = torch.zeros(len(group.tokens.prompt_index), run.prompt_len, dtype=torch.long, device=group.tokens.prompt_index.device)
        number = slots.scatter(1, group.tokens.prompt_index, torch.arange(group.width, device=slots.device).expand_as(group.tokens.prompt_index))
        compat.keep_cached(cache, index, group.width, number.gather(1, last.tokens.prompt_index.to(slots.device)))
        run.trimmed_layers = (*run.trimmed_layers, index)


def note_evicted(cache: Any, run: PromptState, kinds: list[str]) -> None:
    """Others may thin out what a prompt leaves (compression of the cache, by hooks on attention): how many rows each layer lacks."""
    held = (run.cache_len(index).width - int(cache.get_seq_length(index)) if kind == FULL else 0 for index, kind in enumerate(kinds))
    missing = tuple(max(0, rows) for rows in held)
    run.rows_evicted_elsewhere = missing if any(missing) else ()


def static_copy(adapter: Adapter, cache: Any, new: int) -> Any:
    """The rows of ``cache`` in tensors that do not grow, layer by layer as many as it holds and ``new`` more; see ``Handle.static_cache``."""
    if isinstance(new, bool) or not isinstance(new, int) or new < 1:
        raise ValueError(f"max_new_tokens={new!r}: how many tokens may still be written, a whole number from 1 on")
    if other := sorted(set(adapter.layer_types) - {FULL}):
        kinds = ", ".join(other)
        raise ValueError(f"static caches are made of layers with full attention, and {adapter.family} has others ({kinds}): use a dynamic cache")
    if not compat.makes_masks(adapter.text_model.config):
        raise ValueError("static caches hold rows that are not written yet, which a mask must hide: load the model with sdpa or eager attention")
    made = compat.fixed_cache(cache, new)
    if isinstance(cache, PrunedCacheMixin):
        bind_prompt(made, cache.duet_prompt_state)
        made.duet_order = cache.duet_order
    return made


def unbind_prompt(cache: Any) -> None:
    """``cache`` is an ordinary one again."""
    if isinstance(cache, PrunedCacheMixin):
        del cache.duet_prompt_state, cache.duet_order
        cache.__class__ = cache._plain


class DecodePass:
    """One later call on a reduced prompt: a decode step, a few draft tokens, or the next turn's text."""

    def __init__(self, adapter: Adapter, cache: PrunedCacheMixin, mask: Any, kwargs: dict[str, Any]) -> None:
        run = cache.duet_prompt_state
        self.prompt_state, self.adapter, self.cache = run, adapter, cache
        embeds = kwargs["inputs_embeds"]
        self.batch, self.num_new = embeds.shape[:2]
        self.device = embeds.device
        self.reference_group = run.cache_len(adapter.first_attention)  # the layers whose mask the stock code makes from what it is given here
        self.num_generated = int(cache.get_seq_length()) - run.cache_rows(adapter.first_attention)  # type: ignore[attr-defined]
        self.static_capacity = compat.capacity(cache, adapter.first_attention) - self.reference_group.width  # negative: it grows
        if 0 <= self.static_capacity < (said := self.num_generated + self.num_new):
            raise ValueError(f"this static cache has room for {self.static_capacity} tokens behind its prompt, and {said} are written: make it larger")
        self.new_token_mask = self._tail(mask)
        self._check_compressed()
        self.steps = self._steps(mask)
        self.kinds = adapter.layer_types
        self.window = adapter.text_model.config.sliding_window if SLIDING in self.kinds else None
        # a window that reaches back to the first slot hides nothing
        self.windowed = self.window is not None and run.prompt_len + self.num_generated + self.num_new > self.window
        # one query, no padding, own positions: a layer needs nothing as long as the first group's mask came out as none
        self.needs_no_mask = self.num_new == 1 and run.positions == "keep" and not self.windowed and not any(group.padded for group in run.layer_groups)
        self.masks: dict[Any, Any] = {}
        self.rotaries: dict[Any, Rotary] = {}
        kwargs["position_ids"] = self._positions(run.layer_groups[0])
        kwargs["attention_mask"] = self._home_mask(mask, kwargs["attention_mask"], embeds)

    def _tail(self, mask: Any) -> Tensor | None:
        """The part of the caller's mask that covers tokens after the prompt, None if the caller gave no mask."""
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise ValueError("decoding on a reduced cache takes a 2-D attention mask or none; prepared 4-D masks have the unreduced length")
        expected = self.prompt_state.prompt_len + self.num_generated + self.num_new
        if mask.shape[1] != expected:
            raise ValueError(
                f"attention_mask covers {mask.shape[1]} tokens and {self.num_new} new ones were passed, but the reduced cache stands for "
                f"{self.prompt_state.prompt_len + self.num_generated} tokens. To continue a conversation pass only the new token ids (the last sampled one "
                "included) with the mask of the whole conversation."
            )
        return mask[:, self.prompt_state.prompt_len :].bool()

    def _rows(self, x: Tensor, dim: int = 0) -> Tensor:
        """``x`` of the run's samples as that of the cache's rows, reordered as the cache was."""
        order = self.cache.duet_order
        return self._repeated(x if order is None else x.index_select(dim, order.to(x.device)), dim)

    def _repeated(self, x: Tensor, dim: int = 0) -> Tensor:
        """What the caller made for the prompts, where he repeated these himself."""
        return x if x.shape[dim] == self.batch else x.repeat_interleave(self.batch // x.shape[dim], dim)

    def _check_compressed(self) -> None:
        """A cache that others compressed holds rows of which nobody knows any more whether they are real: all of them have to be."""
        if not self.prompt_state.rows_evicted_elsewhere:
            return
        windowed = SLIDING in self.adapter.layer_types
        if windowed or any(group.padded for group in self.prompt_state.layer_groups) or (self.new_token_mask is not None and not bool(self.new_token_mask.all())):
            raise ValueError(
                "the cache of this reduced prompt was compressed by others, and which of its rows are padding or inside a window is not known "
                "any more: send prompts without padding, one at a time or of equal length, to a decoder without sliding layers"
            )
        self.new_token_mask = None

    def _steps(self, mask: Tensor | None) -> Tensor:
        """How far behind the first position after the prompt each new token stands: [new] or [B, new]. Tokens that the mask hides do not count."""
        if mask is None:
            return torch.arange(self.num_new, device=self.device) + self.num_generated
        assert self.prompt_state.num_real_tokens is not None
        real = self._rows(self.prompt_state.num_real_tokens).to(self.device)
        return self._repeated(mask).to(self.device).long().cumsum(1)[:, -self.num_new :] - 1 - real[:, None]

    def _positions(self, group: LayerGroup) -> Tensor:
        if self.prompt_state.positions == "compact" and group is not self.prompt_state.layer_groups[0]:
            start = upload(group.lengths, self.device)
        else:
            assert self.prompt_state.next_position is not None
            start = self.prompt_state.next_position.to(self.device)
        return (self._rows(start, start.ndim - 1)[..., None] + self.steps).clamp(min=0)

    def _mask2d(self, group: LayerGroup) -> Tensor | None:
        if self.new_token_mask is None and not group.padded and self.static_capacity < 0:
            return None
        valid = self._rows(group.tokens.valid)
        keys = group.width + self.num_generated + self.num_new  # fewer than the prompt had where rejected draft tokens were cut off again
        tail = valid.new_ones(self.batch, max(0, self.num_generated + self.num_new)) if self.new_token_mask is None else self._repeated(self.new_token_mask)
        return torch.cat([valid, tail], 1)[:, :keys]

    def _home_mask(self, mask: Any, given: Any, embeds: Tensor) -> Any:
        """What the stock decoder is given: a 2-D mask that it reads once to make its own of; or, where the family has read the caller's
        ``mask`` before and made ``given`` of it, the same made of the rows that are left."""
        rows = self._mask2d(self.reference_group)
        grows = self.static_capacity < 0  # else rows that are not written yet have to be hidden, which no 2-D mask says
        if grows and (mask is None or (isinstance(given, Tensor) and given.ndim == 2)):
            return rows
        kinds = given if isinstance(given, dict) else {FULL: given}
        if grows and not self.reference_group.padded and all(made is None for made in kinds.values()):  # seen to hide nothing
            return None
        made = compat.decoder_mask(self.adapter.text_model.config, embeds, rows, self.cache, self.adapter.first_attention)
        return dict.fromkeys(kinds, made) if isinstance(given, dict) else made  # windows are put in at their layers

    def at_layer(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Give ``layer`` the mask and, with renumbered positions, the rotary table of its own group."""
        if self.needs_no_mask and kwargs.get("attention_mask") is None:  # the model itself saw that the caller's mask hides nothing
            return hidden
        group, held, kind = self.prompt_state.layer_group(index), self.prompt_state.cache_len(index), self.kinds[index]
        if self.prompt_state.positions == "compact" and group is not self.prompt_state.layer_groups[0]:
            table = (group.first_layer, kind)
            if table not in self.rotaries:
                self.rotaries[table] = self.adapter.rotary(hidden, self._positions(group).to(hidden.device), kind)
            kwargs["position_embeddings"] = self.rotaries[table]
        windowed = self.windowed and kind == SLIDING
        if kind != LINEAR and (windowed or held is not self.reference_group):
            key = (held.first_layer, windowed)
            if key not in self.masks:
                self.masks[key] = self._window_mask(held, index, hidden) if windowed else self._mask(held, index, hidden)
            kwargs["attention_mask"] = self.masks[key]
        return hidden

    def _mask(self, group: LayerGroup, index: int, hidden: Tensor) -> Any:
        mask = self._mask2d(group)
        alone = mask is None and self.num_new == 1  # one query sees every key: no mask in any implementation
        return None if alone else compat.decoder_mask(self.adapter.text_model.config, hidden, mask, self.cache, index)

    def _window_mask(self, group: LayerGroup, index: int, hidden: Tensor) -> Any:
        """Windows reach back by slots of the prompt as it was sent; the cache holds the last keys only."""
        config, keys = self.adapter.text_model.config, compat.cached_rows(self.cache, index) + self.num_new
        if not compat.makes_masks(config):  # such kernels count rows themselves
            return self._mask(group, index, hidden)
        rejected = max(0, -self.num_generated)  # draft tokens that came with the prompt and were cut off again
        later = torch.arange(self.num_generated + rejected + self.num_new, device=hidden.device) + self.prompt_state.prompt_len - rejected
        slots = self._rows(group.tokens.prompt_index)[:, : group.width - rejected]
        slots = torch.cat([slots, later.expand(self.batch, -1)], 1)
        mask = self._mask2d(group)
        mask = torch.ones_like(slots, dtype=torch.bool) if mask is None else mask
        assert self.window is not None
        return compat.prepared_mask(config, hidden, masks.window(mask[:, -keys:], slots[:, -keys:], self.num_new, self.window))
