"""Suggest the nearest known name, for errors about unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """``" (did you mean 'duet'?)"`` for the nearest of the ``known`` names, to stand behind the unknown one; "" where none is near."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(given).lower(), names, n=1, cutoff=0.5)
    return f" (did you mean {names[near[0]]!r}?)" if near else ""
