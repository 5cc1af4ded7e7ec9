"""Settings as plain Python values of the type that their field declares."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from duet_vlm.utils.renamed_settings import check_renamed
from duet_vlm.utils.suggest import did_you_mean

# what a field says of itself -> which values are meant, and in words
DECLARED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number (int)"),
    "float": (lambda value: isinstance(value, int | float) and not isinstance(value, bool), "a number"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "Layer": (
        lambda value: value is None or (isinstance(value, int | float) and not isinstance(value, bool)),
        "the number of a vision layer (int), a share of the tower's depth (float) or None",
    ),
    "tuple[int, ...]": (
        lambda value: isinstance(value, tuple) and all(type(item) is int for item in value),
        "whole numbers, as (4, 7)",
    ),
}

FILE = {"file": True}  # metadata of a field that names a file: field(default=None, metadata=FILE)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as people write them, ``{"keep": 0.3, "options.positions": "compact"}``, as methods take them:
    ``{"keep": 0.3, "options": {"positions": "compact"}}``."""
    made: dict[str, Any] = {}
    for key, value in flat.items():
        group, dot, name = key.partition(".")
        if dot:
            made[group] = {**made.get(group, {}), name: value}
        else:
            made[key] = value
    return made


def flattened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The other way round than ``nested``."""
    return {
        f"{key}.{name}" if name else key: each
        for key, value in settings.items()
        for name, each in (value.items() if isinstance(value, Mapping) else [("", value)])
    }


def merged(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those ``given`` in their place; of options only those that are given change."""
    return nested(flattened(settings) | flattened(given))


def is_setting_name(text: str) -> bool:
    """True if a text can name a setting (``keep``) or an option (``options.positions``)."""
    return text.count(".") < 2 and all(part.isidentifier() for part in text.split("."))


def read_value(text: str) -> Any:
    """A setting as people write it: a Python literal where it reads as one, else the text."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()


def to_plain(value: Any) -> Any:
    """Numbers of numpy as Python's, lists as tuples; all else unchanged. The result can be written as JSON and
    compared."""
    if isinstance(value, list | tuple):
        return tuple(to_plain(item) for item in value)
    if isinstance(value, np.floating):
        return float(str(value))  # the decimal that was written: float32's 0.7 is meant as 0.7, not as 0.699999988
    return value.item() if isinstance(value, np.generic) else value


def check_names(method: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse a setting that a method does not have, and an old name or value of one; the ``known`` ones are listed."""
    check_renamed(method, given, known)
    for name in given:
        if name not in known:
            raise ValueError(
                f"{method} has no setting {name!r}{did_you_mean(name, known)}; its settings: {', '.join(known)}"
            )


def check_type(name: str, annotation: Any, value: Any) -> Any:
    """The plain value of a field annotated as int, float or bool, or as one of them or None; other annotations are not
    looked at.

    Raises
    ------
    TypeError
        A value of another type: fractions and truth values are no whole numbers, numbers are no truth values.
    """
    value = to_plain(value)
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    kind = text.removesuffix(" | None")
    if kind in DECLARED and not (value is None and kind != text):
        meant, words = DECLARED[kind]
        if not meant(value):
            raise TypeError(f"{name}={value!r}: give {words}{' or None' if kind != text else ''}")
    return value


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a value that is none of the ``allowed`` ones."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}")
