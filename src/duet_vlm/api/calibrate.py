"""``calibrate``: measure, on prompts with images, the statistics of a model that some methods need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from duet_vlm.api.attach import attach
from duet_vlm.methods import lookup
from duet_vlm.reducers.calibration import Calibration
from duet_vlm.reducers.observer import Observer
from duet_vlm.reducers.registry import registered_methods
from duet_vlm.runtime.compatibility import facts


def calibrate(
    model: nn.Module, method: str, prompts: Iterable[Mapping[str, Any]], path: str | Path | None = None
) -> Calibration:
    """Measure the statistics of ``model`` that ``method`` needs ("fitprune": its table; "d2pruner": the attention by
    position).

    Parameters
    ----------
    model : nn.Module
        A loaded model that nothing is attached to; it is left as it was.
    prompts : iterable of mappings
        What a processor makes: the arguments of ``model.forward``, each with images and a question behind them. Some
        hundred are plenty.
    path : path, optional
        Where to save it: .json for "fitprune", .safetensors for "d2pruner".

    Raises
    ------
    ValueError
        A method that is not calibrated, prompts without images, or a suffix that does not fit; as ``attach``.
    """
    observer = observer_of(method)
    with attach(model, observer) as handle, torch.no_grad():
        for inputs in prompts:
            model(**inputs, use_cache=False)
        model_facts = facts(handle.adapter)
    if not observer.observations.entries:
        raise ValueError("nothing to calibrate by: give prompts with an image and a question behind it")
    calibration = Calibration(method, model_facts, observer.result(model_facts["layers"]))
    if path is not None:
        calibration.save(path)
    return calibration


def observer_of(method: str) -> Observer:
    """The observer that measures a model for a method.

    Raises
    ------
    ValueError
        Unknown methods, and those without calibration.
    """
    make = getattr(lookup.get_method(method), "observer", None)
    if make is None:
        able = ", ".join(name for name, cls in registered_methods().items() if hasattr(cls, "observer"))
        raise ValueError(f"{method} is not calibrated to a model; methods that are: {able}")
    observer = make()
    assert isinstance(observer, Observer)
    return observer
