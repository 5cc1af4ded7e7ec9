"""Recording queries and keys of ONE vision attention module, leaving its output and its attention kernel alone.

The module gets a private copy of its config that names the recorder as attention implementation; the recorder stores q and k of the
running encoder call and then calls the function that the module's own config asks for.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from duet_vlm.flow import compat
from duet_vlm.flow.call import Stacks
from duet_vlm.hooks import foreign
from duet_vlm.models.adapter import Recorded
from duet_vlm.ops.score import one_head

NAME = "duet_vlm_recorder"
FLASH_NAME = "duet_vlm_recorder_flash_attention_2"  # modules choose their packed path by the word "flash" in the name


class Recorder:
    """Owns the private config of one attention module; ``remove`` gives the module its own config object back."""

    def __init__(self, module: nn.Module, stacks: Stacks) -> None:
        self.module, self.stacks, self.config = module, stacks, module.config
        if hasattr(self.config, "_duet_vlm_recorder"):
            raise ValueError("a reducer of another model records this vision tower already (the models share it): detach that one first")
        private = copy.copy(self.config)
        private._duet_vlm_recorder = self
        compat.register_attention(NAME, attend)
        compat.register_attention(FLASH_NAME, attend)
        flash = "flash" in (self.config._attn_implementation or "")
        compat.use_attention(private, FLASH_NAME if flash else NAME)
        self.private = module.config = private

    def remove(self) -> str | None:
        """Give the config back, or name the one that somebody else has put there since."""
        if self.module.config is not self.private:
            return foreign(f"{type(self.module).__name__}.config", self.module.config)
        self.module.config = self.config
        return None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("this vision tower has a duet_vlm reducer attached and cannot be copied or pickled: detach() first, then copy")

    def record(self, query: Tensor, key: Tensor, scaling: float, segments: Tensor | None) -> None:
        if self.stacks.encoders:
            call = self.stacks.encoders[-1]
            reducer = call.rules.reducer
            query, key = query.detach(), key.detach()
            if getattr(reducer, "signal_heads", "each") == "one":
                query, key, scaling = one_head(query, key, scaling)
            call.recorded.append(Recorded(query, key, scaling, segments, getattr(reducer, "signal_queries", None)))


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function that records and delegates."""
    recorder: Recorder | None = getattr(module.config, "_duet_vlm_recorder", None)  # None: removed since this layer was called
    if recorder is not None:
        ends = kwargs.get("cu_seq_lens_q")
        recorder.record(query, key, kwargs["scaling"], None if ends is None else ends[1:] - ends[:-1])
    implementation = (module if recorder is None else recorder).config._attn_implementation
    return compat.attention_function(module, implementation)(module, query, key, value, attention_mask, **kwargs)
