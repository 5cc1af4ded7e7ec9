"""The loss over survivors: labels are gathered by the slots that are left, through the model's public loss setter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from duet_vlm.flow.call import Stacks
from duet_vlm.ops.ragged import take

IGNORED = -100


def surviving_labels(loss: Callable[..., Any], stacks: Stacks) -> Callable[..., Any]:
    """``loss`` with labels [B, S] cut to the rows of the logits [B, T, V]; padding rows count as ignored."""

    def loss_of_survivors(logits: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any) -> Any:
        run = stacks.calls[-1].run if stacks.calls else None
        if run is None or not run.reduces or labels is None or logits is None:
            return loss(logits=logits, labels=labels, **kwargs)
        if kwargs.get("shift_labels") is not None:
            raise ValueError("shift_labels (sequence parallelism) cannot follow dropped tokens: pass labels, or detach")
        last = run.groups[-1].tokens
        if logits.shape[-2] != last.slot.shape[1] or labels.shape[-1] != run.rows:
            raise ValueError(
                f"loss over {logits.shape[-2]} logits rows and {labels.shape[-1]} labels: expected {last.slot.shape[1]} surviving rows "
                f"of a prompt of {run.rows}; logits_to_keep cannot be combined with labels while tokens are dropped"
            )
        kept = take(labels, last.slot.to(labels.device)).masked_fill(~last.valid.to(labels.device), IGNORED)
        return loss(logits=logits, labels=kept, **kwargs)

    return loss_of_survivors
