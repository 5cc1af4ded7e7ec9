"""What every adapter supplies, held to the model's own modules: queries and keys of decoder layers, signals of the vision tower."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import FAMILIES, FIRST, MIXED, build, clips_for, forward, shared
from torch import Tensor, nn
from transformers import AttentionInterface

import duet_vlm
from duet_vlm.methods.visionzip import VisionZip
from duet_vlm.models.adapter import adapter_for

FURTHER = [name for name in FAMILIES if name not in FIRST]
seen: list[Any] = []
caught: dict[str, Tensor] = {}


@dataclass(frozen=True)
class Probe(VisionZip):
    """Looks at what it is given and keeps two fifths."""

    def v2v(self, view: Any) -> Any:
        seen.append(view)
        return super().v2v(view)


def catch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    caught.update(query=query, key=key, scaling=torch.tensor(kwargs["scaling"]))
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


AttentionInterface.register("duet_vlm_test_probe", catch)


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_equal_the_layers_own(family: str) -> None:
    """The attention function of each layer is handed the queries and keys that the adapter computes, and the adapter's scaling."""
    model = build(family)
    adapter, compared = adapter_for(model), []

    def compare(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = next(i for i, other in enumerate(adapter.layers) if other is layer)
        if adapter.ranking_layer(index) != index:
            return
        hidden, rotary = args[0], kwargs["position_embeddings"]
        attention = layer.self_attn
        plain = attention.config
        attention.config = copy.copy(plain)
        attention.config._attn_implementation_internal = "duet_vlm_test_probe"
        attention(hidden_states=layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None, past_key_values=None)
        attention.config = plain
        torch.testing.assert_close(adapter.project_q(layer, hidden, rotary), caught["query"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(adapter.project_k(layer, hidden, rotary), caught["key"], rtol=1e-5, atol=1e-5)
        assert adapter.scaling(layer) == pytest.approx(float(caught["scaling"]))
        compared.append(index)

    for layer in adapter.layers:
        layer.register_forward_pre_hook(compare, with_kwargs=True)
    forward(model, FAMILIES[family].inputs(MIXED))
    assert len(compared) >= 2


@pytest.mark.parametrize("family", FURTHER)
def test_importance_equals_the_towers_attention(family: str) -> None:
    made = FAMILIES[family]
    for rows in (MIXED, clips_for(family)) if made.video else (MIXED,):
        inputs = made.inputs(rows)
        expected = made.signals(shared(family, "eager"), inputs)
        seen.clear()
        with duet_vlm.attach(shared(family), Probe(dominant=0.4, contextual=0.2, parts="joint")):
            forward(shared(family), inputs)
        assert {view.stream for view in seen} == set(expected)
        for view in seen:
            for row, (importance, keys) in enumerate(expected[view.stream]):
                shown = ~importance.isnan()
                assert view.importance is not None and shown.any()
                torch.testing.assert_close(view.importance[row, : len(importance)][shown], importance[shown], rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(view.keys[row, : len(keys)][shown], keys[shown], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_support_matrix_says_what_the_adapter_does(family: str) -> None:
    adapter = adapter_for(shared(family))
    assert adapter.video == any(stream.name == "video" for stream in adapter.streams) == FAMILIES[family].video
    assert adapter.notes and adapter.example.count("/") == 1
