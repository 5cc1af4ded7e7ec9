"""Hooks on one model instance that undo themselves, in reverse order of their installation, and keep hooks that other
code put there since."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

ABSENT: Any = object()  # no instance attribute of that name


class Hook:
    """A hook that refuses to be copied: a copied model would call back into the original's handle. After ``end`` it
    does nothing, for whoever still holds it."""

    def __init__(self, function: Callable[..., Any], *first: Any) -> None:
        self.call: tuple[Callable[..., Any], tuple[Any, ...]] | None = (function, first)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.call  # once: another thread may end it
        if call is None:
            return None
        function, first = call
        return function(*first, *args, **kwargs)

    def end(self) -> None:
        self.call = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.call is None:
            return super().__reduce_ex__(protocol)
        raise TypeError(
            "a duet_vlm reducer is attached, so this model cannot be copied or pickled: detach() first, then copy"
        )


class MethodWrapper(Hook):
    """A wrapped bound method of a module; keeps the signature that callers read. After ``end`` it passes straight to
    the method.

    ``plain`` is what was called before, None where the module had nothing of that name; ``below`` the instance
    attribute that it hides.
    """

    def __init__(self, function: Callable[..., Any], original: Callable[..., Any] | None, hidden: Any) -> None:
        super().__init__(function)
        self.__wrapped__ = function
        self.plain, self.below, self.ended = original, hidden, False

    def end(self) -> None:
        self.ended = True
        if self.plain is not None:
            self.call, self.__wrapped__ = (self.plain, ()), self.plain

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (_itself, (self.__wrapped__,)) if self.ended else super().__reduce_ex__(protocol)


def _itself(function: Any) -> Any:
    """A copy of an ended wrapper: the method that it passed calls to."""
    return function


class Hooks:
    """Everything that was done to a model, as a stack of ways to undo it."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], str | None]] = []

    def add(self, register: Callable[..., Any], function: Callable[..., Any], *first: Any, **options: Any) -> None:
        """Register a module hook that is called with ``first`` in front of its own arguments."""
        hook = Hook(function, *first)
        self._undo += [register(hook, **options).remove, hook.end]

    def shadow(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Put an instance attribute in front of a method."""
        ours = MethodWrapper(function, getattr(module, name, None), vars(module).get(name, ABSENT))
        vars(module)[name] = ours
        self._undo.append(partial(_take_off, module, name, ours))

    def on_undo(self, undo: Callable[[], str | None]) -> None:
        """Remember how to undo something that was done elsewhere.

        ``undo`` names what it left, because others have put it there since.
        """
        self._undo.append(undo)

    def undo(self) -> None:
        """Undo everything, last thing first; what others put on top in the meantime stays, with a warning."""
        remaining: Counter[str] = Counter()
        while self._undo:
            name = self._undo.pop()()
            if name is not None:
                remaining[name] += 1
        if remaining:
            names = ", ".join(name if count == 1 else f"{name} ({count} times)" for name, count in remaining.items())
            warnings.warn(
                f"put on while a reducer was attached, and left there: {names}. What it calls of duet_vlm passes straight to what "
                "was there before",
                stacklevel=5,  # the caller of detach()
            )


def _take_off(module: nn.Module, name: str, ours: MethodWrapper) -> str | None:
    """Put back what ``ours`` hides; return the name of an attribute of other code that stands there by now, and may
    call ours."""
    ours.end()
    top = vars(module).get(name, ABSENT)
    if top is ours:
        below = ours.below
        while isinstance(below, MethodWrapper) and below.ended:  # of a handle that went while this one stood on top
            below = below.below
        if below is ABSENT:
            del vars(module)[name]
        else:
            vars(module)[name] = below
    stock = getattr(type(module), name, None)
    if isinstance(top, MethodWrapper) or top is ABSENT or top is ours.below or getattr(top, "__func__", top) is stock:
        return None
    return foreign(f"{type(module).__name__}.{name}", top)


def foreign(attribute: str, value: Any) -> str:
    """The name of another code's object at ``attribute``, for a warning."""
    code = getattr(getattr(value, "func", value), "__code__", None)  # ``func``: of a partial
    return (
        f"{attribute} ({type(value).__name__ if code is None else f'{code.co_name} of {Path(code.co_filename).name}'})"
    )
