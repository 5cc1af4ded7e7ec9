"""Expand the output to one row per prompt position, for callers that align it with labels themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from duet_vlm.ops.ragged import gather_rows
from duet_vlm.planning.tokens import TokenMap
from duet_vlm.runtime.prompt import PromptState


def align(output: Any, prompt_state: PromptState) -> Any:
    """The output of the multimodal model with ``last_hidden_state`` [B, T, D] of the kept tokens expanded to [B, S, D]."""
    last = prompt_state.layer_groups[-1].tokens
    if hasattr(output, "last_hidden_state"):
        output.last_hidden_state = to_prompt_length(output.last_hidden_state, last, prompt_state.prompt_len)
        return output
    return (to_prompt_length(output[0], last, prompt_state.prompt_len), *output[1:])


def to_prompt_length(hidden: Tensor, tokens: TokenMap, prompt_len: int) -> Tensor:
    """[B, T, D] -> [B, prompt_len, D]: a dropped position repeats the kept token before it.

    The row that predicts position s is then that of the last kept token before s, as in the loss over kept tokens.
    """
    position, valid = tokens.prompt_index.to(hidden.device), tokens.valid.to(hidden.device)
    row = torch.arange(position.shape[1], device=hidden.device).expand_as(position)
    target = torch.where(valid, position, prompt_len)  # padding goes to a position past the end
    row_of = row.new_zeros(position.shape[0], prompt_len + 1).scatter(1, target, row)[:, :prompt_len]
    return gather_rows(hidden, row_of.cummax(1).values)
