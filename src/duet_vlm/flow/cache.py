"""What decoding needs to know about a reduced prompt. It lives on the cache object, so beams, copies and conversations keep it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.budget import SpanPlan
from duet_vlm.flow import compat, masks
from duet_vlm.models.adapter import FULL, LINEAR, SLIDING, Adapter, Rotary
from duet_vlm.tokens import Span, TokenMap

RUN = "_duet_vlm_run"  # attribute of the cache


@dataclass(eq=False)
class Group:
    """Decoder layers from ``first_layer`` on that see the same rows; ``lengths`` are the real rows per sample, known on the host."""

    first_layer: int
    tokens: TokenMap
    lengths: tuple[int, ...]

    @property
    def width(self) -> int:
        return self.tokens.slot.shape[1]

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.width


@dataclass
class Run:
    """One prompt: its spans, what each layer saw, and where decoding goes on. Plain data; no modules, no cache.

    ``rows`` is the prompt's length as sent; ``groups[0]`` is the sequence that entered the decoder, ``group(l)`` what layer l reads.
    """

    rows: int
    positions: str
    spans: tuple[tuple[Span, ...], ...]
    plans: tuple[tuple[SpanPlan, ...], ...]
    prompt: TokenMap
    depth: int
    sources: tuple[tuple[Any, int], ...] = ()
    groups: list[Group] = field(default_factory=list)
    asking: tuple[int, ...] = ()
    scored_layers: tuple[int, ...] = ()
    reused_layers: tuple[int, ...] = ()  # those of them that took over the keys they were ranked by
    element_bytes: int = 4
    next_position: Tensor | None = None
    reduces: bool = False
    cache_bytes: tuple[int, ...] | None = None
    finite: list[tuple[Tensor, str]] = field(default_factory=list)
    decoded: int = 0

    def group(self, layer: int) -> Group:
        """The group that ``layer`` belongs to."""
        return next(g for g in reversed(self.groups) if g.first_layer <= layer)


class DecodePass:
    """One later call on a reduced prompt: a decode step, a few draft tokens, or the next turn's text."""

    def __init__(self, run: Run, adapter: Adapter, cache: Any, mask: Any, kwargs: dict[str, Any]) -> None:
        self.run, self.adapter, self.cache = run, adapter, cache
        embeds = kwargs["inputs_embeds"]
        self.batch, self.new = embeds.shape[:2]
        self.device = embeds.device
        self.home = run.group(adapter.first_attention)  # the layers whose mask the stock code makes from what it is given here
        self.done = int(cache.get_seq_length()) - self.home.width
        self.tail = self._tail(mask)
        self.kinds = adapter.layer_types
        self.window = adapter.text_model.config.sliding_window if SLIDING in self.kinds else None
        # a window that reaches back to the first slot hides nothing
        self.windowed = self.window is not None and run.rows + self.done + self.new > self.window
        # one query, no padding, own positions: a layer needs nothing as long as the first group's mask came out as none
        self.quiet = self.new == 1 and run.positions == "keep" and not self.windowed and not any(group.padded for group in run.groups)
        self.masks: dict[Any, Any] = {}
        self.rotaries: dict[Any, Rotary] = {}
        kwargs["position_ids"] = self._positions(run.groups[0])
        kwargs["attention_mask"] = self._home_mask(mask, kwargs["attention_mask"], embeds)

    def _tail(self, mask: Any) -> Tensor | None:
        """The part of the caller's mask that covers tokens after the prompt, None if the caller gave no mask."""
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise ValueError("decoding on a reduced cache takes a 2-D attention mask or none; prepared 4-D masks have the unreduced length")
        expected = self.run.rows + self.done + self.new
        if mask.shape[1] != expected:
            raise ValueError(
                f"attention_mask covers {mask.shape[1]} tokens and {self.new} new ones were passed, but the reduced cache stands for "
                f"{self.run.rows + self.done} tokens. To continue a conversation pass only the new token ids (the last sampled one "
                "included) with the mask of the whole conversation."
            )
        return mask[:, self.run.rows :].bool()

    def _repeat(self, x: Tensor, dim: int = 0) -> Tensor:
        """Beams and samples multiply the batch after the prompt."""
        return x if x.shape[dim] == self.batch else x.repeat_interleave(self.batch // x.shape[dim], dim)

    def _positions(self, group: Group) -> Tensor:
        step = torch.arange(self.new, device=self.device) + self.done
        if self.run.positions == "compact" and group is not self.run.groups[0]:
            return self._repeat(torch.tensor(group.lengths, device=self.device))[:, None] + step
        start = self.run.next_position
        assert start is not None
        return self._repeat(start, start.ndim - 1)[..., None] + step

    def _mask2d(self, group: Group) -> Tensor | None:
        if self.tail is None and not group.padded:
            return None
        valid = self._repeat(group.tokens.valid)
        keys = group.width + self.done + self.new  # fewer than the prompt had where rejected draft tokens were cut off again
        tail = valid.new_ones(self.batch, max(0, self.done + self.new)) if self.tail is None else self._repeat(self.tail)
        return torch.cat([valid, tail], 1)[:, :keys]

    def _home_mask(self, mask: Any, given: Any, embeds: Tensor) -> Any:
        """What the stock decoder is given: a 2-D mask that it reads once to make its own of; or, where the family has read the caller's
        ``mask`` before and made ``given`` of it, the same made of the rows that are left."""
        rows = self._mask2d(self.home)
        if mask is None or (isinstance(given, Tensor) and given.ndim == 2):
            return rows
        kinds = given if isinstance(given, dict) else {FULL: given}
        if not self.home.padded and all(made is None for made in kinds.values()):  # seen to hide nothing
            return None
        made = compat.decoder_mask(self.adapter.text_model.config, embeds, rows, self.cache, self.adapter.first_attention)
        return dict.fromkeys(kinds, made) if isinstance(given, dict) else made  # windows are put in at their layers

    def at_layer(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Give ``layer`` the mask and, with renumbered positions, the rotary table of its own group."""
        if self.quiet and kwargs.get("attention_mask") is None:  # the model itself saw that the caller's mask hides nothing
            return hidden
        group, kind = self.run.group(index), self.kinds[index]
        if self.run.positions == "compact" and group is not self.run.groups[0]:
            table = (group.first_layer, kind)
            if table not in self.rotaries:
                self.rotaries[table] = self.adapter.rotary(hidden, self._positions(group).to(hidden.device), kind)
            kwargs["position_embeddings"] = self.rotaries[table]
        windowed = self.windowed and kind == SLIDING
        if kind != LINEAR and (windowed or group is not self.home):
            key = (group.first_layer, windowed)
            if key not in self.masks:
                self.masks[key] = self._window_mask(group, index, hidden) if windowed else self._mask(group, index, hidden)
            kwargs["attention_mask"] = self.masks[key]
        return hidden

    def _mask(self, group: Group, index: int, hidden: Tensor) -> Any:
        mask = self._mask2d(group)
        alone = mask is None and self.new == 1  # one query sees every key: no mask in any implementation
        return None if alone else compat.decoder_mask(self.adapter.text_model.config, hidden, mask, self.cache, index)

    def _window_mask(self, group: Group, index: int, hidden: Tensor) -> Any:
        """Windows reach back by slots of the prompt as it was sent; the cache holds the last keys only."""
        config, keys = self.adapter.text_model.config, compat.cached_rows(self.cache, index) + self.new
        if not compat.makes_masks(config):  # such kernels count rows themselves
            return self._mask(group, index, hidden)
        rejected = max(0, -self.done)  # draft tokens that came with the prompt and were cut off again
        later = torch.arange(self.done + rejected + self.new, device=hidden.device) + self.run.rows - rejected
        slots = self._repeat(group.tokens.slot)[:, : group.width - rejected]
        slots = torch.cat([slots, later.expand(self.batch, -1)], 1)
        mask = self._mask2d(group)
        mask = torch.ones_like(slots, dtype=torch.bool) if mask is None else mask
        assert self.window is not None
        return compat.prepared_mask(config, hidden, masks.window(mask[:, -keys:], slots[:, -keys:], self.new, self.window))
