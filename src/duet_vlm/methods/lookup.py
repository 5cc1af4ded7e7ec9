"""Methods and compositions of methods by name."""

from __future__ import annotations

from typing import Any

from duet_vlm.methods.compose import compose
from duet_vlm.reducers import registry
from duet_vlm.reducers.base import Reducer


def get_method(name: str) -> type[Reducer]:
    """Return the class of a method ("duet").

    Raises
    ------
    ValueError
        If the name is unknown (similar names are listed), or is that of a composition, which is no class.
    """
    if "+" in name and all(name.split("+")):
        raise ValueError(f"{name} is a composition of methods and has no class of its own: use make_method({name!r})")
    return registry.registered_class(name)


def make_method(name: str, **settings: Any) -> Reducer:
    """Make a method ("duet") or a composition of methods ("frames+duet") with its settings.

    Raises
    ------
    ValueError
        If a name or a setting is unknown (similar names are listed), or the methods are in the wrong order.
    """
    stages = [registry.registered_class(part)() for part in name.split("+")]
    return (stages[0] if len(stages) == 1 else compose(*stages)).with_settings(settings)


def list_methods() -> dict[str, type[Reducer]]:
    """Return all registered methods by name, sorted."""
    return registry.registered_methods()
