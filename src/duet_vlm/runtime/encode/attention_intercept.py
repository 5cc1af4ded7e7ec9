"""Intercept the attention function of single vision modules without changing their attention kernel.

The module gets a private copy of its config that names our function as attention implementation; ours does its part and
then calls the function of the module's own config. ``QKRecorder`` stores queries and keys of the running encoder call,
``SizeBias`` serves reduced towers.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from duet_vlm.models.adapter import RecordedQK
from duet_vlm.runtime import compat
from duet_vlm.runtime.context import ThreadState
from duet_vlm.runtime.encode.selection import record_qk
from duet_vlm.utils.hooks import foreign

FLASH = "_flash_attention_2"  # modules take their varlen path if the name contains "flash"


class AttentionInterceptor(ABC):
    """Owns the private config of one attention module; ``remove`` restores the module's own config object."""

    name: ClassVar[str]

    def __init__(self, module: nn.Module, state: ThreadState) -> None:
        self.module = module
        self.state = state
        self.config = module.config
        mark = f"_{self.name}"
        if hasattr(self.config, mark):
            raise ValueError(
                "a reducer of another model uses this vision tower already (the models share it): detach that one first"
            )
        private = copy.copy(self.config)
        setattr(private, mark, self)
        for name in (self.name, self.name + FLASH):
            compat.register_attention(name, _intercepting(mark))
        flash = "flash" in (self.config._attn_implementation or "")
        compat.use_attention(private, self.name + FLASH if flash else self.name)
        self.private = module.config = private

    def remove(self) -> str | None:
        """Restore the config, or name the one that other code has put there since."""
        if self.module.config is not self.private:
            return foreign(f"{type(self.module).__name__}.config", self.module.config)
        self.module.config = self.config
        return None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "this vision tower has a duet_vlm reducer attached and cannot be copied or pickled: detach() first, then copy"
        )

    @abstractmethod
    def on_attention(self, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        """Handle one attention call; returns the mask to use."""


class QKRecorder(AttentionInterceptor):
    """Stores queries and keys of the running encoder call."""

    name = "duet_vlm_recorder"

    def on_attention(self, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        if self.state.encode_contexts:
            context = self.state.encode_contexts[-1]
            cu_seqlens = kwargs.get("cu_seq_lens_q")
            segments = None if cu_seqlens is None else cu_seqlens[1:] - cu_seqlens[:-1]
            recorded = record_qk(context.config.reducer, query, key, kwargs["scaling"], segments)
            context.recorded.qk.setdefault(self.module, []).append(recorded)
        return mask


class SizeBias(AttentionInterceptor):
    """Mask and size bias of block ``number`` of a reduced tower.

    Hides dropped patches and adds the log size of merged ones, where the tower itself passes no such mask; stores
    queries and keys where patches are dropped after this attention.
    """

    name = "duet_vlm_weigher"

    def __init__(self, module: nn.Module, state: ThreadState, number: int) -> None:
        super().__init__(module, state)
        self.number = number

    def on_attention(self, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        context = self.state.encode_contexts[-1] if self.state.encode_contexts else None
        if context is None or context.tower_work.state is None or context.call.standalone:
            return mask
        if self.number + 1 in context.tower_work.state.stages:
            context.tower_work.captured_attention.append(RecordedQK(query.detach(), key.detach(), kwargs["scaling"]))
        return context.tower_work.state.mask(mask, key)


def _intercepting(mark: str) -> compat.AttentionFunction:
    """The attention function that calls its interceptor and delegates to the original function."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        # None: removed while this layer was running
        interceptor: AttentionInterceptor | None = getattr(module.config, mark, None)
        if interceptor is not None:
            attention_mask = interceptor.on_attention(query, key, attention_mask, kwargs)
        implementation = (module if interceptor is None else interceptor).config._attn_implementation
        return compat.attention_function(module, implementation)(module, query, key, value, attention_mask, **kwargs)

    return attend
