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
    settings = getattr(config, KEY, None)
    if settings is None:
        raise ValueError(f'this architecture reduces visual tokens and needs settings: --hf-overrides \'{{"{KEY}": {{"budget": '
            f'64}}, ...}}\'')
    return _served(json.dumps(settings, sort_keys=True), positions)


@lru_cache(maxsize=64)
def _served(settings: str, positions: str) -> ServedMethod:
    return ServedMethod.of(json.loads(settings), positions)
