"""The supported families, and the adapter of a loaded model."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from torch import nn

from duet_vlm.models.adapter import Adapter
from duet_vlm.models.unsupported import refusal

WRAPPERS = ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine")


def core_of(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT and parallel wrappers."""
    inner = getattr(model, "module", model) if type(model).__name__ in WRAPPERS else model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def families() -> dict[str, type[Adapter]]:
    """All adapters by family name, sorted."""
    package = importlib.import_module("duet_vlm.models")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"duet_vlm.models.{module.name}")
    return {cls.family: cls for cls in sorted(_concrete(Adapter), key=lambda cls: cls.family)}


def support() -> list[dict[str, Any]]:
    """One row per family: its inputs and notes. Images, several images per prompt and training work for every
    family."""
    return [
        {
            "family": name,
            "model_types": list(cls.model_types),
            "image": True,
            "several images": True,
            "video": cls.video,
            "training": True,
            "positions": ["keep"] if cls.mrope else ["keep", "compact"],
            "notes": cls.notes,
            "example": cls.example,
        }
        for name, cls in families().items()
    ]


def _concrete(cls: type[Any]) -> list[type[Adapter]]:
    adapters = [sub for child in cls.__subclasses__() for sub in _concrete(child)]
    return adapters + ([cls] if "family" in vars(cls) else [])


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a loaded model.

    Raises
    ------
    TypeError
        If the family is not supported (the message lists the families that are), or the model is compiled as a whole.
    """
    core = core_of(model)
    if hasattr(core, "_orig_mod") or getattr(core, "_compiled_call_impl", None) is not None:
        raise TypeError(
            f"this {type(getattr(core, '_orig_mod', core)).__name__} is compiled as a whole (torch.compile), and "
            "what is attached cannot be part of "
            "its graph: attach to the model as it was before, and compile the decoder layers instead (layer.forward = "
            "torch.compile(layer.forward) for each of them)"
        )
    model_type = getattr(getattr(core, "config", None), "model_type", None)
    adapters = families()
    for cls in adapters.values():
        # the model with head, not the one inside it
        if cls.serves(getattr(core, "config", None)) and hasattr(core, "model"):
            adapter = cls(core)
            adapter.check()
            return adapter
    advice = "Pass the whole image-text-to-text model, as AutoModelForImageTextToText loads it."
    raise TypeError(f"{refusal(type(core).__name__, model_type, list(adapters))} {advice}")
