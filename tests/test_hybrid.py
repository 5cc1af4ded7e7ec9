"""Decoders that mix linear and full attention: which layer ranks, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from families import FAMILIES, ONE, forward, randomise, shared
from families.qwen import QWEN_IDS
from families.qwen3_5 import VISION, hybrid_text
from torch import nn
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

import duet_vlm


def released() -> nn.Module:
    """The released order of layers: every fourth has attention."""
    config = Qwen3_5Config(vision_config=VISION, text_config=hybrid_text("LLLFLLLF"), **QWEN_IDS)
    return randomise(Qwen3_5ForConditionalGeneration(config).eval())


@dataclass(frozen=True)
class Refused:
    method: str
    settings: dict[str, Any]
    drop: int
    first: int


REFUSED = [
    Refused("fastv", {"layers": 2, "keep": 0.4}, 2, 4),
    Refused("fastv", {"layers": 3, "keep": 0.4}, 3, 4),
    Refused("duet", {"schedule": ((2, 0.5),)}, 2, 3),
    Refused("pyramiddrop", {"schedule": ((1, 0.5), (5, 0.2))}, 1, 3),
]


@pytest.mark.parametrize("refused", REFUSED, ids=str)
def test_ranking_before_the_first_attention_is_refused(refused: Refused) -> None:
    message = (
        rf"{refused.method} drops before decoder layer {refused.drop}, but qwen3_5 has no attention to rank tokens by before layer 3: "
        rf"drop before layer {refused.first} or later"
    )
    with pytest.raises(ValueError, match=message):
        duet_vlm.attach(released(), refused.method, **refused.settings)


def test_the_named_layer_is_accepted_and_methods_without_ranking_drop_anywhere() -> None:
    model, inputs = released(), FAMILIES["qwen3_5"].inputs([ONE])
    for method, settings, scored in (
        ("fastv", {"layers": 4, "keep": 0.4}, (3,)),
        ("duet", {"schedule": ((3, 0.5), (6, 0.2), (7, 0.1))}, (3, 7)),
        ("random", {"entry": 1.0, "schedule": ((1, 0.3),)}, ()),
        ("duet", {"schedule": ((2, 0.0),)}, ()),
    ):
        with duet_vlm.attach(model, method, **settings) as handle:
            forward(model, inputs)
            assert handle._run is not None and handle._run.scored_layers == scored
            assert handle.report().measured[7] < 20


def test_caches_of_linear_layers_hold_no_tokens() -> None:
    model, inputs = shared("qwen3_5"), FAMILIES["qwen3_5"].inputs([ONE])
    with duet_vlm.attach(model, "duet", budget=0.4) as handle:
        cache = forward(model, inputs, use_cache=True).past_key_values
        held = handle._run.cache_bytes  # type: ignore[union-attr]
        report = handle.report()
    assert [bytes_ > 0 for bytes_ in held] == [kind == "full_attention" for kind in model.config.text_config.layer_types]
    assert sum(held) == report.observed.kv_bytes == sum(c.keys.nbytes + c.values.nbytes for c in cache.layers if hasattr(c, "keys"))
