"""A module with weights of its own, on a model while it is attached: trained, moved and counted with the model, and never saved as a part of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.compressor import Sizes
from duet_vlm.hooks import Hooks
from duet_vlm.models.adapter import Adapter
from duet_vlm.reducer import Reducer

NAME = "duet_vlm_module"


class Apart(nn.Module):
    """Holds a module that ``parameters()`` and ``to()`` of the model around it reach, and its state dict does not."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.register_load_state_dict_post_hook(_not_missing)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        return {} if destination is None else destination


def _not_missing(module: nn.Module, incompatible: Any) -> None:
    """Weights that a model's own file does not hold are not missing there."""
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if NAME not in key.split(".")]


def sizes_of(adapter: Adapter, reducer: Any) -> Sizes:
    """What a module for this model is made for."""
    vision, hidden = adapter.vision_shape(), adapter.decoder_shape().hidden
    in_front = adapter.pointwise is not None and not reducer.reads_projected
    levels = len(reducer.signal_layers) * vision.width if "states" in reducer.signals else 0
    return Sizes(vision.projector[0][0] if in_front else hidden, levels, hidden, adapter.fixed_tokens)


def made_for(adapter: Adapter, compressor: Any) -> dict[str, Any]:
    """What weights must have in common with the model that they are used on, beyond its facts."""
    sizes = sizes_of(adapter, compressor)
    return {"rows of width": sizes.rows, "levels of width": sizes.levels}


def own_module(adapter: Adapter, reducer: Reducer, facts: dict[str, Any], hooks: Hooks) -> nn.Module | None:
    """The module of a method that has one, made, loaded and put on the model; ``hooks`` take it off again."""
    compressor = getattr(reducer, "compressor", None)
    if compressor is None:
        return None
    module: nn.Module = compressor.built(sizes_of(adapter, compressor), facts | made_for(adapter, compressor))
    weight = next(adapter.projector().parameters())
    module.to("cpu" if weight.is_meta else weight.device).train(adapter.model.training)
    adapter.base.add_module(NAME, Apart(module))
    hooks.on_undo(lambda: adapter.base._modules.pop(NAME, None) and None)
    return module


def touched(embeds: Tensor, module: nn.Module) -> Tensor:
    """Embeddings plus zero times every weight: ranks that train together wait for the gradient of each, whether this one's batch used it or not."""
    sums = [weight.float().sum() for weight in module.parameters()]
    return embeds + (0 * torch.stack(sums).sum()).to(embeds.device, embeds.dtype) if sums else embeds
