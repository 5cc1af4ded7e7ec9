"""A gradient inside the decoder: by which rows would the model's own prediction change, were it made one layer further on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import Adapter
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.runtime.prefill.attention_scores import layer_device

ROWS = 4  # rows that are predicted from: those before the last one
LIFTED = 1000.0  # the loss in half precision, where small gradients vanish


def prediction_gradient(
    adapter: Adapter, layer: nn.Module, hidden: Tensor, valid: Tensor, kwargs: dict[str, Any], name: str, by_embeddings: bool = False
) -> Tensor:
    """d loss / d ``hidden`` [B, T, D] float32, where the loss is the cross entropy of what each sample would predict after ``layer``, the last norm
    and the head, against its own likeliest tokens: the mean over the ``ROWS`` real rows before its last (PIO-FVLM, arXiv 2602.04657).

    ``valid`` [B, T] bool; ``kwargs`` are what ``layer`` is called with, cache excluded; ``by_embeddings``: the input embeddings are the head.
    Parameters get no gradient.

    Raises
    ------
    ValueError
        In training, under ``torch.inference_mode``, without a head, and where the layer's kernels have no gradient; naming the method ``name``.
    """
    if hidden.requires_grad:
        raise ValueError(f"{name} takes a gradient of its own and cannot be trained through: run the model under torch.no_grad()")
    if torch.is_inference_mode_enabled() or hidden.is_inference():
        raise ValueError(f"{name} needs a gradient, which torch.inference_mode() forbids: use torch.no_grad(), or a method without gradient")
    if adapter.model.get_output_embeddings() is None:
        raise ValueError(f"{name} predicts with the model's head, and {type(adapter.model).__name__} has none: attach to the model that generates")
    lift = LIFTED if hidden.dtype == torch.float16 else 1.0
    with torch.enable_grad():
        rows = hidden.detach().requires_grad_()
        try:
            after = layer.forward(rows.view_as(rows), **kwargs)  # counters of work hook the inputs of modules, which leaves refuse
            after = gather_rows(after[0] if isinstance(after, tuple) else after, _before_last(valid.to(hidden.device)))
            logits = _predicted(adapter, after, by_embeddings).float().flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, logits.argmax(-1), reduction="sum") / ROWS
            (gradient,) = torch.autograd.grad(loss * lift, rows)
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"{name} needs a gradient through {type(layer).__name__}, which this model's kernels do not give ({error}): use a method without"
            ) from error
    return gradient.float() / lift


def _predicted(adapter: Adapter, rows: Tensor, by_embeddings: bool) -> Tensor:
    """Logits [B, n, vocabulary] of rows behind a layer [B, n, D]; the modules' own code, without hooks."""
    norm, head = adapter.text_model.norm, adapter.model.get_output_embeddings()
    rows = norm.forward(rows.to(layer_device(norm, rows)))
    if by_embeddings:
        table = adapter.model.get_input_embeddings().weight
        return nn.functional.linear(rows.to(table.device), table)
    return head.forward(rows.to(layer_device(head, rows)))


def _before_last(valid: Tensor) -> Tensor:
    """The rows before the last real one of each sample, nearest first; those of short samples repeat their first: [B, T] -> [B, ROWS]."""
    order = valid.view(torch.uint8).sort(dim=1, descending=True, stable=True).indices
    back = torch.arange(2, 2 + ROWS, device=valid.device)
    return order.gather(1, (valid.sum(1, keepdim=True) - back).clamp(min=0))
