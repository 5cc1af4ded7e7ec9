"""The loss over kept tokens: labels are gathered by prompt position, through the model's public loss setter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from duet_vlm.ops.ragged import gather_rows
from duet_vlm.runtime.context import ThreadState

IGNORED = -100


def gather_labels(loss: Callable[..., Any], state: ThreadState) -> Callable[..., Any]:
    """``loss`` with labels [B, S] cut to the rows of the logits [B, T, V]; padding rows count as ignored."""

    def loss_of_survivors(logits: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any) -> Any:
        prompt_state = state.forward_contexts[-1].prompt_state if state.forward_contexts else None
        if prompt_state is None or not prompt_state.reduces or labels is None or logits is None:
            return loss(logits=logits, labels=labels, **kwargs)
        if kwargs.get("shift_labels") is not None:
            raise ValueError("shift_labels (sequence parallelism) cannot follow dropped tokens: pass labels, or detach")
        last = prompt_state.layer_groups[-1].tokens
        if logits.shape[-2] != last.prompt_index.shape[1] or labels.shape[-1] != prompt_state.prompt_len:
            raise ValueError(
                f"loss over {logits.shape[-2]} logits rows and {labels.shape[-1]} labels: expected {last.prompt_index.shape[1]} surviving rows "
                f"of a prompt of {prompt_state.prompt_len}; logits_to_keep cannot be combined with labels while tokens are dropped"
            )
        kept = gather_rows(labels, last.prompt_index.to(labels.device)).masked_fill(
            ~last.valid.to(labels.device), IGNORED
        )
        return loss(logits=logits, labels=kept, **kwargs)

    return loss_of_survivors
