"""Suggest the nearest known names, for errors about unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

NEAR = 3  # names that an error offers


def did_you_mean(given: object, known: Iterable[str], most: int = 1) -> str:
    """``" (did you mean 'duet'?)"`` for the nearest of the ``known`` names, to stand behind the unknown one; "" where
    none is near.

    ``most``: so many near names at most, the nearest first ("'duet', 'dart' or 'fastv'").
    """
    names = {name.lower(): name for name in known}
    near = [repr(names[each]) for each in difflib.get_close_matches(str(given).lower(), names, n=most, cutoff=0.5)]
    return f" (did you mean {' or '.join(filter(None, (', '.join(near[:-1]), near[-1])))}?)" if near else ""


def unknown(what: str, given: object, known: Iterable[str], where: str) -> ValueError:
    """The error for a name that is not among the ``known``: those near it, and ``where`` all of them are listed."""
    return ValueError(f"unknown {what} {given!r}{did_you_mean(given, known, NEAR)}; {where} lists those there are")
