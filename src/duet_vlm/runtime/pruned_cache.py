"""The KV cache of a reduced prompt: it holds the prompt's state, follows its reordering, and ends with its contents."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from duet_vlm.models.adapter import FULL, Adapter
from duet_vlm.runtime import compat
from duet_vlm.runtime.prompt import PromptState


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
        self._reorder(
            self._sample_numbers(self.duet_prompt_state.prompt.prompt_index.device).repeat_interleave(repeats)
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens after the last visual one, or all of them: before that, the layers hold different tokens."""
        held = int(self.get_seq_length())  # type: ignore[attr-defined]
        removed = abs(int(tokens_to_remove))
        generated = held - self.duet_prompt_state.cache_rows(self._first_filled_layer())
        removable = generated + self.duet_prompt_state.record.num_text_after_image
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
        return (
            torch.arange(len(self.duet_prompt_state.spans), device=device)
            if self.duet_order is None
            else self.duet_order
        )

    def _reorder(self, index: Tensor) -> None:
        self.duet_order = self._sample_numbers(index.device)[index]


@functools.lru_cache(maxsize=64)
def _pruned_class(original: Any) -> Any:
    """A subclass of a cache class that keeps the prompt state; same name."""
    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_plain": original,
    }
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
        zeros = torch.zeros(
            len(group.tokens.prompt_index),
            prompt_state.prompt_len,
            dtype=torch.long,
            device=group.tokens.prompt_index.device,
        )
        index_of_position = zeros.scatter(
            1,
            group.tokens.prompt_index,
            torch.arange(group.width, device=zeros.device).expand_as(group.tokens.prompt_index),
        )
        compat.keep_cached(
            cache, index, group.width, index_of_position.gather(1, last.tokens.prompt_index.to(zeros.device))
        )
        prompt_state.record.trimmed_layers = (*prompt_state.record.trimmed_layers, index)


def record_evicted(cache: Any, prompt_state: PromptState, kinds: list[str]) -> None:
    """Record how many rows of each layer other code removed (cache compression by hooks on attention)."""
    num_missing = (
        prompt_state.cached_group(index).width - int(cache.get_seq_length(index)) if kind == FULL else 0
        for index, kind in enumerate(kinds)
    )
    evicted = tuple(max(0, rows) for rows in num_missing)
    prompt_state.record.rows_evicted_elsewhere = evicted if any(evicted) else ()


def static_copy(adapter: Adapter, cache: Any, num_new: int) -> Any:
    """A static copy of ``cache`` with room for ``num_new`` more tokens in each layer; see ``Handle.static_cache``."""
    if isinstance(num_new, bool) or not isinstance(num_new, int) or num_new < 1:
        raise ValueError(f"max_new_tokens={num_new!r}: how many tokens may still be written, a whole number from 1 on")
    other = sorted(set(adapter.layer_types) - {FULL})
    if other:
        kinds = ", ".join(other)
        raise ValueError(
            f"static caches are made of layers with full attention, and {adapter.family} has others ({kinds}): use a dynamic cache"
        )
    if not compat.makes_masks(adapter.text_model.config):
        raise ValueError(
            "static caches hold rows that are not written yet, which a mask must hide: load the model with sdpa or eager attention"
        )
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
