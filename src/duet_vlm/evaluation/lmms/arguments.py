"""From ``--model_args`` to what ``attach`` and ``generate`` take. Nothing here needs lmms-eval."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import duet_vlm
from duet_vlm.utils.field_types import nested

# settings of one generation that a task may give, besides max_new_tokens and until
GENERATION = (
    "do_sample",
    "length_penalty",
    "min_new_tokens",
    "num_beams",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
)
LONGEST = 1024  # new tokens where a task gives no limit


@dataclass(frozen=True)
class ModelArguments:
    """A method as ``attach`` takes it; ``label`` names it in results."""

    label: str
    method: str | duet_vlm.Reducer
    budget: int | float | None = None
    fields: dict[str, Any] = field(default_factory=dict)


def parse_arguments(
    method: str | None, budget: int | float | None, preset: str | None, fields: Mapping[str, Any]
) -> ModelArguments:
    """The reduction that a run asks for: a preset alone, or a method (default duet) with budget and settings.

    Raises
    ------
    ValueError
        A preset beside anything else, or an unknown preset.
    """
    if preset is None:
        return ModelArguments(
            method or "duet",
            method or "duet",
            budget,
            nested({name: value_of(given) for name, given in fields.items()}),
        )
    others = [name for name, given in {"method": method, "budget": budget, **fields}.items() if given is not None]
    if others:
        raise ValueError(f"preset={preset} brings its method and all settings: leave out {', '.join(others)}")
    return ModelArguments(preset, duet_vlm.preset(preset))


def value_of(given: Any) -> Any:
    """A setting's value: text is a Python literal where it reads as one (``[[16,0.5],[24,0.0]]``)."""
    if not isinstance(given, str):
        return given
    try:
        return ast.literal_eval(given)
    except (ValueError, SyntaxError):
        return given


def fields_of(settings: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """``settings=`` of the model arguments: JSON text (``{"keep": 0.3}``) or a mapping.

    Raises
    ------
    ValueError
        If it is neither.
    """
    if isinstance(settings, str):
        try:
            settings = json.loads(settings)
        except ValueError as error:
            raise ValueError(f"settings={settings}: not JSON ({error})") from error
    if settings is not None and not isinstance(settings, Mapping):
        raise ValueError(f'settings={settings!r}: give a JSON object, for example {{"keep": 0.3}}')
    return dict(settings or {})


def generation_of(task: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...], list[str]]:
    """A task's ``generation_kwargs`` as (arguments of ``generate``, texts to stop at, names that mean nothing to
    ``generate``).

    Greedy unless the temperature is above 0 or the task says ``do_sample``.
    """
    until = task.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    out: dict[str, Any] = {"max_new_tokens": int(task.get("max_new_tokens") or LONGEST)}
    out |= {name: task[name] for name in GENERATION if task.get(name) is not None}
    temperature = out.get("temperature")
    sampled = (
        temperature is not None and temperature > 0 if "do_sample" not in out else out["do_sample"] and temperature != 0
    )
    out["do_sample"] = bool(sampled)
    if not out["do_sample"]:
        # a checkpoint's own defaults would only raise warnings
        out |= {"temperature": None, "top_p": None, "top_k": None}
    return out, stops, sorted(set(task) - {"max_new_tokens", "until", *GENERATION})


def cut(text: str, stops: tuple[str, ...]) -> str:
    """``text`` up to the first of ``stops``."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))].strip()
