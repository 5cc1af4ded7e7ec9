"""Standing in front of the attention function of single vision modules, leaving their attention kernel alone.

The module gets a private copy of its config that names our function as attention implementation; ours does its part and then calls the
function that the module's own config asks for. ``Recorder`` stores queries and keys of the running encoder call, ``Weigher`` serves towers
that are reduced.
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

FLASH = "_flash_attention_2"  # modules choose their packed path by the word "flash" in the name


class AttentionInterceptor(ABC):
    """Owns the private config of one attention module; ``remove`` gives the module its own config object back."""

    name: ClassVar[str]

    def __init__(self, module: nn.Module, state: ThreadState) -> None:
        self.module, self.state, self.config = module, state, module.config
        mark = f"_{self.name}"
        if hasattr(self.config, mark):
            raise ValueError("a reducer of another model uses this vision tower already (the models share it): detach that one first")
        private = copy.copy(self.config)
        setattr(private, mark, self)
        for name in (self.name, self.name + FLASH):
            compat.register_attention(name, _attend(mark))
        flash = "flash" in (self.config._attn_implementation or "")
        compat.use_attention(private, self.name + FLASH if flash else self.name)
        self.private = module.config = private

    def remove(self) -> str | None:
        """Give the config back, or name the one that somebody else has put there since."""
        if self.module.config is not self.private:
            return foreign(f"{type(self.module).__name__}.config", self.module.config)
        self.module.config = self.config
        return None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("this vision tower has a duet_vlm reducer attached and cannot be copied or pickled: detach() first, then copy")

    @abstractmethod
    def seen(self, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        """What is to be done with one call; returns the mask to go on with."""


class QKRecorder(AttentionInterceptor):
    """Stores queries and keys of the running encoder call."""

    name = "duet_vlm_recorder"

    def seen(self, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        if self.state.encode_contexts:
            call, ends = self.state.encode_contexts[-1], kwargs.get("cu_seq_lens_q")
            segments = None if ends is None else ends[1:] - ends[:-1]
            call.recorded_qk.setdefault(self.module, []).append(record_qk(call.config.reducer, query, key, kwargs["scaling"], segments))
        return mask


class SizeBias(AttentionInterceptor):
    """In block ``number`` of a tower that is reduced: hides what left and adds the bias of rows that stand for several, where the tower itself
    hands over no mask that does; stores queries and keys where units leave behind this attention."""

    name = "duet_vlm_weigher"

    def __init__(self, module: nn.Module, state: ThreadState, number: int) -> None:
        super().__init__(module, state)
        self.number = number

    def seen(self, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        call = self.state.encode_contexts[-1] if self.state.encode_contexts else None
        if call is None or call.tower_state is None or call.standalone:
            return mask
        if self.number + 1 in call.tower_state.stages:
            call.captured_attention.append(RecordedQK(query.detach(), key.detach(), kwargs["scaling"]))
        return call.tower_state.mask(mask, key)


def _attend(mark: str) -> compat.AttentionFunction:
    """The attention function that does its owner's part and delegates."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        owner: AttentionInterceptor | None = getattr(module.config, mark, None)  # None: removed since this layer was called
        if owner is not None:
            attention_mask = owner.seen(query, key, attention_mask, kwargs)
        implementation = (module if owner is None else owner).config._attn_implementation
        return compat.attention_function(module, implementation)(module, query, key, value, attention_mask, **kwargs)

    return attend
