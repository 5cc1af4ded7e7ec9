"""A module with weights of its own, on a model while it is attached.

Trained, moved and counted with the model, and never saved as a part of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import Adapter
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.compressor import ModuleSizes, compressor_of
from duet_vlm.reducers.inputs import Input
from duet_vlm.utils.hooks import Hooks

NAME = "duet_vlm_module"
FROZEN = (
    "all weights of its own module are frozen (get_peft_model and model.requires_grad_(False) freeze what is attached)"
)
REMEDY = "attach behind them, or call handle.module.requires_grad_(True) before the optimizer is made"


class UnsavedModule(nn.Module):
    """Holds a module that ``parameters()`` and ``to()`` of the model around it reach, and its state dict does not.

    Its layers are not among ``named_modules()``, only a leaf with all their weights is: PEFT, which goes by names and
    kinds of layers, would put adapters into them that no file of weights has, or fail on a part with a layer's name.
    """

    def __init__(self, module: nn.Module, new: bool) -> None:
        super().__init__()
        self.module = module
        self.keys = frozenset(module.state_dict())
        self.start = _sums(module) if new else None  # of weights that nobody trained
        self.told = False
        self.register_load_state_dict_post_hook(_not_missing)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        return {} if destination is None else destination

    def named_modules(
        self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        if remove_duplicate and self in memo:
            return
        memo.add(self)
        yield prefix, self
        yield f"{prefix}.module" if prefix else "module", _Leaf(self.module)

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError(
            f"{NAME} holds the weights of a reducer that is attached, and cannot be copied. To copy the model: detach() "
            "first. With PEFT: leave it out of modules_to_save, which trains a copy that nothing runs; call "
            "handle.module.requires_grad_(True) behind get_peft_model, and handle.save_weights(folder) saves it"
        )

    @property
    def frozen(self) -> bool:
        weights = list(self.module.parameters())
        return bool(weights) and not any(weight.requires_grad for weight in weights)

    @property
    def untrained(self) -> bool:
        """True if its weights are the initial ones."""
        return self.start is not None and self.start == _sums(self.module)


def _sums(module: nn.Module) -> tuple[float, ...]:
    """Of every weight, on the host in float64: the same where nothing was learned, on any device."""
    return tuple(float(weight.detach().cpu().double().sum()) for weight in module.parameters())


class _Leaf(nn.Module):
    """All weights and buffers of a module under their own names, and none of its layers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._parameters, self._buffers = dict(module.named_parameters()), dict(module.named_buffers())
        self.training = module.training


def _not_missing(module: nn.Module, incompatible: Any) -> None:
    """Weights that a model's own file does not hold are not missing there."""
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if NAME not in key.split(".")]


def module_sizes(adapter: Adapter, reducer: Any) -> ModuleSizes:
    """The sizes of a module for this model."""
    vision, hidden = adapter.vision_dims(), adapter.decoder_dims().hidden
    in_front = adapter.pointwise_projector is not None and Input.PROJECTED_FEATURES not in reducer.requires
    levels = len(reducer.signal_layers) * vision.width if Input.STATES in reducer.requires else 0
    return ModuleSizes(vision.projector[0][0] if in_front else hidden, levels, hidden, adapter.fixed_tokens)


def weight_facts(adapter: Adapter, compressor: Any) -> dict[str, Any]:
    """Further facts that saved weights must share with the model that they are used on."""
    sizes = module_sizes(adapter, compressor)
    return {"rows of width": sizes.rows, "levels of width": sizes.levels}


def install_module(adapter: Adapter, reducer: Reducer, facts: dict[str, Any], hooks: Hooks) -> nn.Module | None:
    """The module of a method that has one, made, loaded and put on the model; ``hooks`` take it off again."""
    compressor = compressor_of(reducer)
    if compressor is None:
        return None
    module: nn.Module = compressor.build_module(
        module_sizes(adapter, compressor), facts | weight_facts(adapter, compressor)
    )
    weight = next(adapter.projector().parameters())
    module.to("cpu" if weight.is_meta else weight.device).train(adapter.model.training)
    apart = UnsavedModule(module, compressor.weights is None)
    adapter.base.add_module(NAME, apart)
    hooks.on_undo(lambda: adapter.base._modules.pop(NAME, None) and None)
    return module


def check_learns(adapter: Adapter, method: str) -> None:
    """In a training step: refuse a frozen module that has learned nothing; of one that has, say once that it stays."""
    apart = adapter.base._modules.get(NAME)
    if not isinstance(apart, UnsavedModule) or apart.told or not apart.frozen:
        return
    if apart.untrained:
        raise ValueError(f"{method}: {FROZEN} and untrained, so the model would learn to read random rows: {REMEDY}")
    apart.told = True
    warnings.warn(f"{method}: {FROZEN}, so they stay as they are; if they are to learn, {REMEDY}", stacklevel=2)


def check_saved(adapter: Adapter, method: str) -> None:
    """Before weights are written.

    Refuse those that were frozen before they learned, and a module with replaced layers.
    """
    apart = adapter.base._modules.get(NAME)
    if not isinstance(apart, UnsavedModule):
        return
    if apart.frozen and apart.untrained:
        raise ValueError(f"{method}: {FROZEN} and untrained, so there is nothing to save: {REMEDY}")
    differ = sorted(apart.keys ^ set(apart.module.state_dict()))
    if differ:
        raise ValueError(
            f"{method}: layers of its module were replaced since it was attached ({', '.join(differ[:3])}"
            f"{', ...' if len(differ) > 3 else ''}), and attach could not load these weights: take the replacements out "
            "(merge adapters) before saving"
        )


def touch_all_params(embeds: Tensor, module: nn.Module) -> Tensor:
    """Embeddings plus zero times every weight.

    Ranks that train together wait for the gradient of each, whether this one's batch used it or not.
    """
    sums = [weight.float().sum() for weight in module.parameters()]
    return embeds + (0 * torch.stack(sums).sum()).to(embeds.device, embeds.dtype) if sums else embeds
