"""Distributed training: a rank whose batch has no image must not fall out of step with those that encode theirs.

Sharded towers (FSDP, ZeRO-3) gather their parameters when they run, and DDP waits for the gradient of every parameter:
a rank that skips the tower leaves the others waiting for ever, in stock models too. Such a rank encodes one blank
image, times nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import Adapter


def needs_rank_sync(model: nn.Module) -> bool:
    """True if other ranks wait for this one to run the tower: they train together, or parameters are sharded."""
    if (
        not (torch.distributed.is_available() and torch.distributed.is_initialized())
        or torch.distributed.get_world_size() == 1
    ):
        return False
    return model.training or _is_sharded(model)


def _is_sharded(model: nn.Module) -> bool:
    """FSDP is known by its modules (while they run, their parameters look whole), ZeRO-3 by its parameters."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    sharded = any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())
    return sharded or any(hasattr(weight, "ds_id") for weight in model.parameters())


def add_dummy_image(adapter: Adapter, encode: Callable[..., Any], embeds: Tensor) -> Tensor:
    """Embeddings [B, S, D] plus nothing: zero times the mean of the features of one blank image."""
    output = encode(**adapter.blank_image())
    levels = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
    nothing = 0 * torch.stack([row.mean(dtype=torch.float32) for rows in levels for row in rows]).mean()
    return embeds + nothing.to(embeds.device, embeds.dtype)
