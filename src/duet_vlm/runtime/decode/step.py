"""One decoding step, or the next turn, on the cache of a reduced prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import FULL, LINEAR, SLIDING, Adapter, Rotary
from duet_vlm.ops.ragged import upload
from duet_vlm.runtime import compat, masks
from duet_vlm.runtime.prompt import LayerGroup
from duet_vlm.runtime.pruned_cache import PrunedCacheMixin


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
        self.reference_group = prompt_state.cached_group(adapter.first_attention)
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
        self.windowed = (
            self.window is not None and prompt_state.prompt_len + self.num_generated + self.num_new > self.window
        )
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
            raise ValueError(
                "decoding on a reduced cache takes a 2-D attention mask or none; prepared 4-D masks have the unreduced length"
            )
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
        if not self.prompt_state.record.rows_evicted_elsewhere:
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
        assert self.prompt_state.continuation.num_real_tokens is not None
        num_prompt_tokens = self._in_cache_order(self.prompt_state.continuation.num_real_tokens).to(self.device)
        return (
            self._repeat_for_batch(mask).to(self.device).long().cumsum(1)[:, -self.num_new :]
            - 1
            - num_prompt_tokens[:, None]
        )

    def _positions(self, group: LayerGroup) -> Tensor:
        """Position ids of the new tokens in the layers of ``group``."""
        if self.prompt_state.positions == "compact" and group is not self.prompt_state.layer_groups[0]:
            start = upload(group.lengths, self.device)
        else:
            assert self.prompt_state.continuation.next_position is not None
            start = self.prompt_state.continuation.next_position.to(self.device)
        return (self._in_cache_order(start, start.ndim - 1)[..., None] + self.steps).clamp(min=0)

    def _mask_2d(self, group: LayerGroup) -> Tensor | None:
        """[B, keys] bool of cached and new tokens in the layers of ``group``; None where all are valid."""
        if self.new_token_mask is None and not group.padded and self.static_capacity < 0:
            return None
        valid = self._in_cache_order(group.tokens.valid)
        # fewer than in the prompt where rejected draft tokens were cut off
        keys = group.width + self.num_generated + self.num_new
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
        # it hides nothing
        if grows and not self.reference_group.padded and all(prepared is None for prepared in kinds.values()):
            return None
        prepared = compat.decoder_mask(
            self.adapter.text_model.config, embeds, mask_2d, self.cache, self.adapter.first_attention
        )
        # windowed layers get theirs in at_layer
        return dict.fromkeys(kinds, prepared) if isinstance(given, dict) else prepared

    def at_layer(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Set the mask of ``layer`` and, with renumbered positions, its rotary table."""
        # the model found that the caller's mask hides nothing
        if self.needs_no_mask and kwargs.get("attention_mask") is None:
            return hidden
        group, cached, kind = (
            self.prompt_state.layer_group(index),
            self.prompt_state.cached_group(index),
            self.kinds[index],
        )
        if self.prompt_state.positions == "compact" and group is not self.prompt_state.layer_groups[0]:
            key = (group.first_layer, kind)
            if key not in self.rotaries:
                self.rotaries[key] = self.adapter.rotary(hidden, self._positions(group).to(hidden.device), kind)
            kwargs["position_embeddings"] = self.rotaries[key]
        windowed = self.windowed and kind == SLIDING
        if kind != LINEAR and (windowed or cached is not self.reference_group):
            mask_key = (cached.first_layer, windowed)
            if mask_key not in self.masks:
                self.masks[mask_key] = (
                    self._window_mask(cached, index, hidden) if windowed else self._mask(cached, index, hidden)
                )
            kwargs["attention_mask"] = self.masks[mask_key]
        return hidden

    def _mask(self, group: LayerGroup, index: int, hidden: Tensor) -> Any:
        """The mask of a layer with full attention."""
        mask = self._mask_2d(group)
        one_query = mask is None and self.num_new == 1  # one query sees every key: no mask in any implementation
        return (
            None if one_query else compat.decoder_mask(self.adapter.text_model.config, hidden, mask, self.cache, index)
        )

    def _window_mask(self, group: LayerGroup, index: int, hidden: Tensor) -> Any:
        """The mask of a sliding layer: windows count positions of the original prompt.

        The cache holds the last keys only.
        """
        config, keys = self.adapter.text_model.config, compat.cached_rows(self.cache, index) + self.num_new
        if not compat.makes_masks(config):  # such kernels apply the window themselves
            return self._mask(group, index, hidden)
        rejected = max(0, -self.num_generated)  # draft tokens of the prompt that were cut off
        new_positions = (
            torch.arange(self.num_generated + rejected + self.num_new, device=hidden.device)
            + self.prompt_state.prompt_len
            - rejected
        )
        positions = self._in_cache_order(group.tokens.prompt_index)[:, : group.width - rejected]
        positions = torch.cat([positions, new_positions.expand(self.batch, -1)], 1)
        mask = self._mask_2d(group)
        mask = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask
        assert self.window is not None
        return compat.prepared_mask(
            config, hidden, masks.window(mask[:, -keys:], positions[:, -keys:], self.num_new, self.window)
        )
