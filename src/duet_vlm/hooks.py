"""Hooks on one model instance that undo themselves, in reverse order of their installation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Hook:
    """A hook that refuses to be copied: a copied model would call back into the original's handle."""

    def __init__(self, function: Callable[..., Any], *first: Any) -> None:
        self.function, self.first = function, first

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*self.first, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a duet_vlm reducer is attached, so this model cannot be copied or pickled: detach() first, then copy")


class Wrapped(Hook):
    """A wrapped bound method of the model; keeps the signature that callers read."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self.__wrapped__ = function


class Hooks:
    """Everything that was done to a model, as a stack of ways to undo it."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def add(self, register: Callable[..., Any], function: Callable[..., Any], *first: Any, **options: Any) -> None:
        """Register a module hook that is called with ``first`` in front of its own arguments."""
        self._undo.append(register(Hook(function, *first), **options).remove)

    def shadow(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Put an instance attribute in front of a method."""
        before = module.__dict__.get(name)
        module.__dict__[name] = Wrapped(function)

        def undo() -> None:
            module.__dict__.pop(name)
            if before is not None:
                module.__dict__[name] = before

        self._undo.append(undo)

    def on_undo(self, undo: Callable[[], Any]) -> None:
        """Remember how to undo something that was done elsewhere."""
        self._undo.append(undo)

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()
