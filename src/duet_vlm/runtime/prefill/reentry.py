"""Re-entry: visual tokens that a stage leaves out sleep, and may be chosen again at the next one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duet_vlm.models.adapter import LINEAR, Adapter
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.planning.tokens import TokenMap
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.inputs import Input


@dataclass(frozen=True)
class SleepingRows:
    """The rows that entered the decoder, from one decision to the next.

    Attributes
    ----------
    hidden : Tensor
        [B, S, D] hidden states at the decision; sleeping rows keep them.
    awake : Tensor
        [B, S] bool, rows that the layers compute.
    row_of : Tensor
        [B, S] long, where ``awake``: the row of the layers' input that each one is.
    """

    hidden: Tensor
    awake: Tensor
    row_of: Tensor

    @classmethod
    def of(cls, hidden: Tensor, tokens: TokenMap) -> SleepingRows:
        """The rows ``hidden`` [B, S, D], of which ``tokens`` [B, T] are awake."""
        index = tokens.entry_index  # padding points at rows that sleep
        none = index.new_zeros(hidden.shape[:2])
        rows = torch.arange(index.shape[1], device=index.device).expand_as(index)
        return cls(hidden, none.bool().scatter(1, index, tokens.valid), none.scatter(1, index, rows))

    def joined(self, hidden: Tensor) -> Tensor:
        """All rows [B, S, D]: those that are awake as in ``hidden`` [B, T, D], the others as they fell asleep."""
        awake, row_of, asleep = (x.to(hidden.device) for x in (self.awake, self.row_of, self.hidden))
        return torch.where(awake[..., None], gather_rows(hidden, row_of), asleep)


def check_reentry(adapter: Adapter, reducer: Reducer) -> None:
    """Refuse what cannot be combined with re-entry.

    Raises
    ------
    ValueError
        Naming the method and the reason.
    """
    if reducer.options.reentry == "none":
        return

    def refuse(why: str, instead: str = "use reentry='none'") -> None:
        raise ValueError(f"{reducer.name}: reentry='stage' {why}; {instead}")

    if reducer.options.positions != "keep":
        refuse(
            "brings tokens back to their original positions, which positions='compact' gives to others", "use 'keep'"
        )
    if reducer.options.trim_kv_cache:
        refuse(
            "leaves every layer the keys and values of its own tokens, and trim_kv_cache=True those of the last layer",
            "use trim_kv_cache=False",
        )
    if reducer.merges:
        refuse("wakes tokens as they fell asleep, and a token that was merged into another one counts there already")
    for needed in (Input.PREVIOUS_HIDDEN_STATES, Input.GRADIENT):
        if needed in reducer.requires:
            refuse(f"has no {needed.value} of a token that slept in the layer before")
    if LINEAR in adapter.layer_types:
        refuse(
            f"skips layers for a token, and a layer of {adapter.family} with a state of its own would miss it for good"
        )


def refuse_recomputing(adapter: Adapter, reducer: Reducer) -> None:
    """Refuse gradient checkpointing of the decoder's layers.

    Raises
    ------
    ValueError
        If the layers of this forward would run again in the backward pass.
    """
    if torch.is_grad_enabled() and any(
        layer.training and getattr(layer, "gradient_checkpointing", False) for layer in adapter.layers
    ):
        raise recomputed(reducer)


def recomputed(reducer: Reducer) -> ValueError:
    return ValueError(
        f"{reducer.name}: reentry='stage' keeps the states of sleeping tokens outside the layers, so none can run again "
        "in the backward pass: switch gradient checkpointing off for the decoder, or use reentry='none'"
    )
