"""A gradient inside the decoder: the influence of each token on the prediction that one more layer would make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import Adapter
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.runtime.prefill.attention_scores import layer_device

ROWS = 4  # number of tokens that predict: those before the last one
LOSS_SCALE = 1000.0  # in half precision, where small gradients vanish


def prediction_gradient(
    adapter: Adapter,
    layer: nn.Module,
    hidden: Tensor,
    valid: Tensor,
    kwargs: dict[str, Any],
    name: str,
    by_embeddings: bool = False,
) -> Tensor:
    """The gradient d loss / d ``hidden`` [B, T, D] in float32 (PIO-FVLM, arXiv 2602.04657).

    The loss is the cross entropy of each sample's prediction after ``layer``, the last norm and the head, against its
    own likeliest tokens: the mean over the ``ROWS`` valid tokens before the last one. Parameters get no gradient.

    ``valid`` [B, T] bool; ``kwargs`` of ``layer``, cache excluded; ``by_embeddings``: the input embeddings are the
    head.

    Raises
    ------
    ValueError
        In training, under ``torch.inference_mode``, without a head, and where the layer's kernels have no gradient;
        naming the method ``name``.
    """
    if hidden.requires_grad:
        raise ValueError(
            f"{name} takes a gradient of its own and cannot be trained through: run the model under torch.no_grad()"
        )
    if torch.is_inference_mode_enabled() or hidden.is_inference():
        raise ValueError(
            f"{name} needs a gradient, which torch.inference_mode() forbids: use torch.no_grad(), or a method without gradient"
        )
    if adapter.model.get_output_embeddings() is None:
        raise ValueError(
            f"{name} predicts with the model's head, and {type(adapter.model).__name__} has none: attach to the model that generates"
        )
    scale = LOSS_SCALE if hidden.dtype == torch.float16 else 1.0
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        try:
            # FLOP counters hook the inputs of modules, which must not be leaves
            after = layer.forward(leaf.view_as(leaf), **kwargs)
            after = gather_rows(after[0] if isinstance(after, tuple) else after, _before_last(valid.to(hidden.device)))
            logits = _logits(adapter, after, by_embeddings).float().flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, logits.argmax(-1), reduction="sum") / ROWS
            (gradient,) = torch.autograd.grad(loss * scale, leaf)
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"{name} needs a gradient through {type(layer).__name__}, which this model's kernels do not give ({error}): use a method without"
            ) from error
    return gradient.float() / scale


def _logits(adapter: Adapter, rows: Tensor, by_embeddings: bool) -> Tensor:
    """Logits [B, n, vocabulary] of a layer's output [B, n, D]; the modules' own forward, without hooks."""
    norm = adapter.text_model.norm
    head = adapter.model.get_output_embeddings()
    rows = norm.forward(rows.to(layer_device(norm, rows)))
    if by_embeddings:
        table = adapter.model.get_input_embeddings().weight
        return nn.functional.linear(rows.to(table.device), table)
    return head.forward(rows.to(layer_device(head, rows)))


def _before_last(valid: Tensor) -> Tensor:
    """The tokens before the last valid one of each sample, nearest first.

    Short samples repeat their first: [B, T] -> [B, ROWS].
    """
    order = valid.view(torch.uint8).sort(dim=1, descending=True, stable=True).indices
    distance = torch.arange(2, 2 + ROWS, device=valid.device)
    return order.gather(1, (valid.sum(1, keepdim=True) - distance).clamp(min=0))
