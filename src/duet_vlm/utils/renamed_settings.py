"""Settings of methods that once had other names or values, and the error that names today's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {  # old -> new
    "mass": "proportional_attention",
    "context": "pooled_context_tokens",
    "keep_predicting": "protect_predicting_tokens",
    "share": "multi_image",
    "parts": "crops",
    "cache": "trim_kv_cache",
    "clamp_below": "small_image_tokens",
    "newline": "newline_tokens",
    "least": "min_tokens",
}
VALUES: dict[str, dict[object, object]] = {  # new name -> old value -> new value
    "multi_image": {"each": "per_image"},
    "crops": {"each": "per_crop"},
    "trim_kv_cache": {"full": False, "cut": True},
}


def renamed(method: str, name: str, value: object) -> str | None:
    """The advice for an old name or an old value of a setting of ``method``, None if neither is old; in a composition
    the name may carry the name of one of its methods."""
    prefix = next((f"{part}_" for part in method.split("+") if "+" in method and name.startswith(f"{part}_")), "")
    bare = name.removeprefix(prefix)
    new = NAMES.get(bare, bare)
    changed = VALUES.get(new, {})
    today = changed[value] if isinstance(value, str) and value in changed else value
    if new == bare and today is value:
        return None
    return f"{name}={value!r} is an old way to write a setting: give {prefix}{new}={today!r}"


def check_renamed(method: str, settings: Mapping[str, Any], known: Sequence[str] = ()) -> None:
    """Refuse settings of ``method`` with an old name that is none of the ``known`` ones, or with an old value.

    Raises
    ------
    ValueError
        Naming the method, the setting, and what to write today.
    """
    for name, value in settings.items():
        old_name = name not in known
        if (old_name or name in VALUES) and (advice := renamed(method, name, value)):
            raise ValueError(f"{method}: {advice}")
