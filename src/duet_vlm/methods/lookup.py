"""Methods and compositions of methods by name."""

from __future__ import annotations

from duet_vlm.methods.compose import composition_class
from duet_vlm.reducers import registry
from duet_vlm.reducers.base import Reducer


def get_method(name: str) -> type[Reducer]:
    """Return the class of a method ("duet") or of a composition ("frames+duet").

    Raises
    ------
    ValueError
        If a name is unknown (similar names are listed), or the methods are in the wrong order.
    """
    classes = tuple(registry.registered_class(part) for part in name.split("+"))
    return classes[0] if len(classes) == 1 else composition_class(classes)


def list_methods() -> dict[str, type[Reducer]]:
    """Return all registered methods by name, sorted."""
    return registry.registered_methods()
