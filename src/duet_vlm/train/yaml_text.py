"""YAML as people write it for training runs: 1e-3 is a number, ``no`` is a word, and a file is a mapping of settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

NUMBER = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
TRUTH = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
BOOL = "tag:yaml.org,2002:bool"


def mapping(text: str, name: str) -> Mapping[str, Any]:
    """The settings in a file's text; ``name`` is for errors.

    Raises
    ------
    ValueError
        If it is no YAML, or no mapping.
    """
    import yaml

    try:
        parsed = yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{name}: expected a mapping of settings, got {type(parsed).__name__}")
    return parsed


def scalar(text: str) -> Any:
    """A single value: ``true``, ``1e-3``, ``[a, b]``, or text."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError:
        return text


def written(values: Mapping[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    import yaml

    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def _loader() -> Any:
    """PyYAML's safe loader with numbers and truth values as in YAML 1.2; a class of our own, so that other loaders do
    not change."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            first: [(tag, rule) for tag, rule in rules if tag != BOOL]
            for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    Loader.add_implicit_resolver(BOOL, TRUTH, list("tTfF"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789"))
    return Loader
