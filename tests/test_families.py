"""What every adapter supplies, held to the model's own modules: queries and keys of decoder layers, signals of the
vision tower."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import FAMILIES, FIRST, IMAGE, MIXED, build, clips_for, forward, shared
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import duet_vlm
from duet_vlm.methods.encoder.visionzip import VisionZip
from duet_vlm.models.llama_like import LLAMA_LAYOUT
from duet_vlm.models.lookup import adapter_for
from duet_vlm.reducers.options import TokenOptions

FURTHER = [name for name in FAMILIES if name not in FIRST]
seen: list[Any] = []
caught: dict[str, Tensor] = {}


@dataclass(frozen=True)
class Probe(VisionZip):
    """Looks at what it is given and keeps two fifths."""

    def select_tokens(self, view: Any) -> Any:
        seen.append(view)
        return super().select_tokens(view)


def catch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    caught.update(query=query, key=key, scaling=torch.tensor(kwargs["scaling"]))
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


AttentionInterface.register("duet_vlm_test_probe", catch)


def compared_layers(model: nn.Module, work: Any) -> list[int]:
    """The layers whose attention function was handed, while ``work`` ran, the queries and keys that the adapter
    computes, and its scaling."""
    adapter, compared = adapter_for(model), []

    def compare(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = next(i for i, other in enumerate(adapter.layers) if other is layer)
        if adapter.ranking_layer(index) != index:
            return
        caught.clear()
        hidden, rotary, attention = args[0], kwargs["position_embeddings"], layer.self_attn
        plain, attention.config = attention.config, copy.copy(attention.config)
        attention.config._attn_implementation_internal = "duet_vlm_test_probe"
        attention(
            hidden_states=layer.input_layernorm(hidden),
            position_embeddings=rotary,
            attention_mask=None,
            past_key_values=None,
        )
        attention.config = plain
        asking = torch.arange(hidden.shape[1]).flip(0).expand(len(hidden), -1)  # every row, in another order
        query, key = adapter.project(layer, hidden, rotary, asking)
        torch.testing.assert_close(query, caught["query"].flip(2), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(key, caught["key"], rtol=1e-5, atol=1e-5)
        assert adapter.scaling(layer) == pytest.approx(float(caught["scaling"]))
        compared.append(index)

    for layer in adapter.layers:
        layer.register_forward_pre_hook(compare, with_kwargs=True)
    work()
    return compared


@pytest.mark.every_family
@pytest.mark.parametrize("family", FAMILIES)
def test_projections_equal_the_layers_own(family: str) -> None:
    model = build(family)
    assert len(compared_layers(model, lambda: forward(model, FAMILIES[family].inputs(MIXED)))) >= 2


@pytest.mark.every_family
@pytest.mark.parametrize("family", FURTHER)
def test_importance_equals_the_towers_attention(family: str) -> None:
    made = FAMILIES[family]
    for rows in (MIXED, clips_for(family)) if made.video else (MIXED,):
        inputs = made.inputs(rows)
        expected = made.signals(shared(family, "eager"), inputs)
        seen.clear()
        with duet_vlm.attach(shared(family), Probe(dominant=0.4, contextual=0.2, options=TokenOptions(crops="joint"))):
            forward(shared(family), inputs)
        assert {view.modality for view in seen} == set(expected)
        for view in seen:
            for row, (importance, keys) in enumerate(expected[view.modality]):
                shown = ~importance.isnan()
                assert view.importance is not None and shown.any()
                torch.testing.assert_close(
                    view.importance[row, : len(importance)][shown], importance[shown], rtol=1e-4, atol=1e-6
                )
                torch.testing.assert_close(view.keys[row, : len(keys)][shown], keys[shown], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_support_matrix_says_what_the_adapter_does(family: str) -> None:
    adapter = adapter_for(shared(family))
    assert (
        (adapter.video is True)
        == any(stream.name == "video" for stream in adapter.modalities)
        == FAMILIES[family].video
    )
    assert adapter.notes and adapter.example.count("/") == 1


# ---- decoders that a family may come with

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 130,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
}


def with_decoder(kind: str) -> nn.Module:
    known = CONFIG_MAPPING[kind]().to_dict()
    wanted = (
        SIZES
        | {key: value for key, value in EXPERTS.items() if key in known}
        | ({"head_dim": 16} if "head_dim" in known else {})
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=20,
        patch_size=4,
        projection_dim=32,
    )
    config = LlavaConfig(vision_config=vision, text_config=CONFIG_MAPPING[kind](**wanted), image_token_id=IMAGE)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)  # norms and biases, too, away from where they start
    return model


@pytest.mark.parametrize("kind", LLAMA_LAYOUT)
def test_projections_equal_those_of_every_decoder_that_is_let_in(kind: str) -> None:
    model = with_decoder(kind)
    with torch.no_grad():
        assert compared_layers(model, lambda: model(input_ids=torch.arange(5, 25)[None])) == [0, 1, 2]


@pytest.mark.parametrize(
    "kind", ["cohere", "cohere2", "glm", "glm4", "helium", "ernie4_5", "gemma2", "olmo2", "gpt_oss", "smollm3"]
)
def test_decoders_with_another_layout_are_refused(kind: str) -> None:
    """Their keys are rotated, scaled or normed in another way; some layers are not rotated at all."""
    with pytest.raises(
        TypeError,
        match=f"ranking tokens with a {kind} decoder is not tested here, so it is refused; tested are: llama, ",
    ):
        adapter_for(with_decoder(kind))


# ---- layers of the tower that nobody reads


def runs_of(model: nn.Module, work: Any) -> list[int]:
    """How often each layer of a CLIP tower's attention runs."""
    runs = [0] * len(model.model.vision_tower.encoder.layers)

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            runs[index] += 1

        return hook

    hooks = [
        layer.self_attn.register_forward_hook(count(i))
        for i, layer in enumerate(model.model.vision_tower.encoder.layers)
    ]
    work()
    for hook in hooks:
        hook.remove()
    return runs


UNREAD = ["llava", "vipllava", "llava_next", "llava_next_video"]


@pytest.mark.parametrize("method", ["duet", "fastv"])
@pytest.mark.parametrize("family", UNREAD)
def test_a_layer_that_nobody_reads_is_not_run(family: str, method: str) -> None:
    model, inputs = build(family), FAMILIES[family].inputs(MIXED)
    depth = len(model.model.vision_tower.encoder.layers)
    assert runs_of(model, lambda: forward(model, inputs)) == [1] * depth
    with duet_vlm.attach(model, method, budget=0.5) as handle:
        with torch.no_grad():
            last = runs_of(model, lambda: model(**inputs))
            assert (
                last == [1] * (depth - 1) + [0]
                and handle.report().observed.vision_flops < handle.report().full.vision_flops
            )
            fewer = model(**inputs).logits
        assert runs_of(model, lambda: model(**inputs)) == [1] * depth  # with gradients: left alone
        torch.testing.assert_close(model(**inputs).logits, fewer)
    with torch.no_grad():
        assert runs_of(model, lambda: model(**inputs)) == [1] * depth


def test_a_layer_that_somebody_reads_is_run() -> None:
    model, inputs = build("llava"), FAMILIES["llava"].inputs(MIXED)
    encode = {"pixel_values": inputs["pixel_values"]}
    deepest = model.model.get_image_features(**encode, vision_feature_layer=-1).hidden_states[-1]
    depth = len(model.model.vision_tower.encoder.layers)
    with torch.no_grad(), duet_vlm.attach(model, "fastv", budget=0.5):
        for asked in ({"vision_feature_layer": -1}, {"output_hidden_states": True}):
            assert torch.equal(model.model.get_image_features(**encode, **asked).hidden_states[-1], deepest)
    with torch.no_grad(), duet_vlm.attach(model, "duet", budget=0.5, options=TokenOptions(signal_layer=depth - 1)):
        assert runs_of(model, lambda: model(**inputs)) == [1] * depth
