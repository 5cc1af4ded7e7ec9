"""Methods and compositions of methods by name."""

from __future__ import annotations

from duet_vlm import registry
from duet_vlm.methods.compose import composed
from duet_vlm.reducer import Reducer


def get(name: str) -> type[Reducer]:
    """The class of a method ("duet") or of a composition ("frames+duet").

    Raises
    ------
    ValueError
        If a name is unknown (those near it are named), or the methods do not follow each other.
    """
    classes = tuple(registry.get(part) for part in name.split("+"))
    return classes[0] if len(classes) == 1 else composed(classes)


def methods() -> dict[str, type[Reducer]]:
    """All registered methods by name, sorted."""
    return registry.methods()
