"""Single methods by name: those that registered themselves, those of installed packages (entry points), and those of
files that the command line names."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from duet_vlm.reducers import method_files
from duet_vlm.reducers.base import Reducer
from duet_vlm.utils import lab
from duet_vlm.utils.suggest import unknown

ENTRY_POINT_GROUP = "duet_vlm.methods"

_methods: dict[str, type[Reducer]] = {}
_loaded: set[str] = set()


def register(name: str) -> Callable[[type[Reducer]], type[Reducer]]:
    """Class decorator: make a reducer available as ``attach(model, name)``.

    Raises
    ------
    ValueError
        If the name is taken by another class or is not lower-case letters, digits and underscores.
    TypeError
        If the class is not a Reducer.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"method name {name!r}: use lower-case letters, digits and underscores")

    def add(cls: type[Reducer]) -> type[Reducer]:
        if not (isinstance(cls, type) and issubclass(cls, Reducer)):
            raise TypeError(f"{cls!r} is not a Reducer: derive from duet_vlm.EncoderReducer or duet_vlm.DecoderReducer")
        known = _methods.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"method {name!r} is already registered by {known.__module__}.{known.__qualname__}")
        cls.name = name
        _methods[name] = cls
        return cls

    return add


def registered_class(name: str) -> type[Reducer]:
    """The class of a method; unknown names raise a ``ValueError`` that names those near it."""
    _load(name)
    if name not in _methods and name in lab.METHODS:
        raise ValueError(lab.how_to_install("method", name))
    if name not in _methods:
        raise unknown("method", name, sorted(_methods), "'duet-vlm methods'")
    return _methods[name]


def registered_methods() -> dict[str, type[Reducer]]:
    """All registered methods by name, sorted, without references of evaluations."""
    _load()
    return {name: cls for name, cls in sorted(_methods.items()) if not cls.reference}


@functools.cache
def _offered() -> tuple[EntryPoint, ...]:
    """Methods of installed packages, not imported yet."""
    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def _load(*names: str) -> None:
    """Import methods that other packages offer, those of these ``names`` or all, each once, and files that have been
    announced since."""
    for entry in _offered():
        if entry.value not in _loaded and (not names or entry.name in names):
            _loaded.add(entry.value)
            register(entry.name)(entry.load())
    method_files.load()
