"""The hidden states of all tokens that entered the decoder, of a method whose tokens sleep and come back."""

from __future__ import annotations

import torch
from torch import Tensor

from duet_vlm.models.adapter import StateChange
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.runtime.prompt import LayerGroup


class TokenStream:
    """Hidden states of the tokens that entered the decoder, in their order there: [B, S, D].

    A sleeping token has the state in which the last layer that computed it left it. Layers compute the awake ones by
    themselves; these are written back where a stage, or a ranking, looks at all.

    Attributes
    ----------
    states : Tensor or None
        [B, S, D] at the last stage; None before the first one.
    before_stage : dict
        Stage -> ``states`` in front of it, with gradients, for layers that run again (checkpointing).
    """

    def __init__(self) -> None:
        self.states: Tensor | None = None
        self.before_stage: dict[int, Tensor | None] = {}

    def at_stage(self, layer: int, hidden: Tensor, awake: LayerGroup) -> Tensor:
        """All states [B, S, D] at the stage before ``layer``, whose input are ``hidden`` [B, T, D] of the tokens
        ``awake``."""
        if layer in self.before_stage:  # the layer runs again
            return _written(self.before_stage[layer], hidden, awake)
        if torch.is_grad_enabled():
            self.before_stage[layer] = self.states
        self.states = _written(self.states, hidden, awake)
        return self.states

    def joined(self, hidden: Tensor, awake: LayerGroup) -> Tensor:
        """All states [B, S, D] where no stage is; as ``at_stage``."""
        return _written(self.states, hidden, awake)

    def change(self, changed: StateChange, entered: LayerGroup) -> None:
        """Change the states by what the decoder adds between layers: ``changed`` takes states and their tokens."""
        if self.states is not None:
            self.states = changed(self.states, entered.tokens)

    def check_runs_again(self, layer: int) -> None:
        """Refuse to run ``layer`` again where the first run left no gradient.

        Raises
        ------
        ValueError
            With re-entrant gradient checkpointing.
        """
        if torch.is_grad_enabled() and layer not in self.before_stage:
            raise ValueError(
                "options.reentry: sleeping tokens pass by the layers that checkpointing runs again, and its re-entrant kind loses their "
                "gradient: use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )


def _written(states: Tensor | None, hidden: Tensor, awake: LayerGroup) -> Tensor:
    """``states`` [B, S, D] with ``hidden`` [B, T, D] in place of those of the tokens ``awake``."""
    if states is None:
        return hidden
    states, index = states.to(hidden.device), awake.tokens.entry_index.to(hidden.device)
    if awake.padded:  # padding points at tokens that sleep
        hidden = torch.where(awake.tokens.valid.to(hidden.device)[..., None], hidden, gather_rows(states, index))
    return states.scatter(1, index[..., None].expand_as(hidden), hidden)
