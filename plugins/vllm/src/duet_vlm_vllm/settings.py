"""The settings of a server, read from the model's config in every process of vLLM."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from duet_vlm.serve.served_method import KEY, ServedMethod


def served(config: Any, positions: str) -> ServedMethod:
    """The settings that ``--hf-overrides`` (or config.json) gives under "duet".

    Raises
    ------
    ValueError
        If there are none, or none that a server can run.
    """
    given = getattr(config, KEY, None)
    if given is None:
        raise ValueError(
            f'this architecture reduces visual tokens and needs settings: --hf-overrides \'{{"{KEY}": {{"budget": 64}}, ...}}\''
        )
    depth = None
    if isinstance(given, dict) and given.get("stages") == "all":
        depth = config.get_text_config().num_hidden_layers
    return _served(json.dumps(given, sort_keys=True), positions, depth)


@lru_cache(maxsize=64)
def _served(given: str, positions: str, depth: int | None) -> ServedMethod:
    return ServedMethod.of(json.loads(given), positions, depth)
