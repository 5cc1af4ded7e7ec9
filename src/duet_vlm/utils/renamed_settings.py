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
OPTIONS = frozenset(  # settings of every method once, fields of TokenOptions today
    {
        "positions",
        "protect_predicting_tokens",
        "small_image_tokens",
        "cls_token",
        "signal_layer",
        "signal_queries",
        "crops",
        "newline_tokens",
        "text_query",
        "training_turns",
        "skip_unanswered",
        "multi_image",
        "trim_kv_cache",
        "proportional_attention",
        "pooled_context_tokens",
    }
)


def renamed(method: str, name: str, value: object) -> str | None:
    """The advice for an old way to write a setting of ``method``, None if it is none: an old name, an old value, or an
    option of ``TokenOptions`` among the settings; in a composition the name may carry the name of one of its methods."""
    prefix = next((f"{part}_" for part in method.split("+") if "+" in method and name.startswith(f"{part}_")), "")
    bare = name.removeprefix(prefix)
    new = NAMES.get(bare, bare)
    changed = VALUES.get(new, {})
    today = changed[value] if isinstance(value, str) and value in changed else value
    moved = new in OPTIONS and method != "TokenOptions"
    if new == bare and today is value and not moved:
        return None
    if moved:
        advice = f"options=TokenOptions({new}={today!r}), as text options.{new}={today}"
    else:
        advice = f"{prefix}{new}={today!r}"
    return f"{name}={value!r} is an old way to write a setting: give {advice}"


def check_renamed(method: str, settings: Mapping[str, Any], known: Sequence[str] = ()) -> None:
    """Refuse settings of ``method`` with an old name that is none of the ``known`` ones, or with an old value.

    Raises
    ------
    ValueError
        Naming the method, the setting, and what to write today.
    """
    for name, value in settings.items():
        if (name not in known or name in VALUES) and (advice := renamed(method, name, value)):
            raise ValueError(f"{method}: {advice}")
