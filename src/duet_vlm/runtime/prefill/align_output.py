"""One row per prompt slot again, for callers that line the decoder's output up with labels themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from duet_vlm.ops.ragged import gather_rows
from duet_vlm.planning.tokens import TokenMap
from duet_vlm.runtime.decode.cache import PromptState


def align(output: Any, run: PromptState) -> Any:
    """The output of the multimodal model with ``last_hidden_state`` [B, T, D] of the survivors stretched to [B, S, D]."""
    last = run.layer_groups[-1].tokens
    if hasattr(output, "last_hidden_state"):
        output.last_hidden_state = to_prompt_length(output.last_hidden_state, last, run.prompt_len)
        return output
    return (to_prompt_length(output[0], last, run.prompt_len), *output[1:])


def to_prompt_length(hidden: Tensor, tokens: TokenMap, rows: int) -> Tensor:
    """[B, T, D] -> [B, rows, D]: a slot that was dropped repeats the survivor before it.

    The row that predicts slot s is then that of the last survivor before s, as in the loss over survivors.
    """
    slot, valid = tokens.prompt_index.to(hidden.device), tokens.valid.to(hidden.device)
    number = torch.arange(slot.shape[1], device=hidden.device).expand_as(slot)
    spare = torch.where(valid, slot, rows)  # padding goes to a slot past the end
    row_of = number.new_zeros(slot.shape[0], rows + 1).scatter(1, spare, number)[:, :rows]
    return gather_rows(hidden, row_of.cummax(1).values)
