"""Every mistake gets one clear error that names the value and the remedy, and the model is untouched afterwards."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, MIXED, ONE, PAD, TEXT, TWO, Picture, build, forward, generate, shared
from method_matrix import OFFICIAL
from test_detach import snapshot
from torch import nn
from transformers import AutoModelForSeq2SeqLM, BartConfig, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import duet_vlm
from duet_vlm import BudgetError
from duet_vlm.methods.decoder.fastv import FastV
from duet_vlm.methods.two_stage.duet import Duet
from duet_vlm.models.lookup import families
from duet_vlm.models.unsupported import REASONS
from duet_vlm.reducers.options import TokenOptions


@dataclass(frozen=True)
class Wrong:
    """Settings for attach() that must be refused with ``error`` and a message that matches ``message``."""

    settings: dict[str, Any]
    error: type[Exception]
    message: str
    family: str = "llava"

    def __str__(self) -> str:
        plain = {
            k: v if isinstance(v, int | float | str | tuple) else type(v).__name__ for k, v in self.settings.items()
        }
        return ", ".join(f"{k}={v}" for k, v in plain.items()) + f" on {self.family}"


AT_ATTACH = [
    Wrong({"budget": -1}, BudgetError, r"budget=-1 tokens: give at least 1, or a fraction"),
    Wrong({"budget": 0}, BudgetError, r"budget=0 tokens: give at least 1"),
    Wrong({"budget": 1.5}, BudgetError, r"budget=1\.5: a float is a fraction in \(0, 1\].*for a token count give an int"),
    Wrong({"budget": math.nan}, BudgetError, r"budget=nan"),
    Wrong({"budget": True}, TypeError, r"budget must be an int .* got True"),
    Wrong({"budget": "64"}, TypeError, r"budget must be an int .* got '64'"),
    Wrong({}, BudgetError, r"duet needs a budget \(budget=64 tokens, budget=0\.22 of the tokens\) or its own settings"),
    Wrong({"method": "fastv", "budget": 3}, BudgetError, r"fastv cannot reach 3 .*span of 36 tokens.*floor is 4\.5 tokens.*Raise the budget"),
    Wrong({"method": "pyramiddrop", "budget": 0.1}, BudgetError, r"pyramiddrop cannot reach 3\.6 .*floor is 4\.5 tokens"),
    Wrong({"budget": 10, "dominant": 5}, ValueError, r"duet: give either budget= or the method's own settings \(.*\), not both"),
    Wrong({"method": "fastv", "budget": 10, "layers": 3}, ValueError, r"fastv: give either budget= or .*not both"),
    Wrong({"dominant": 40}, ValueError, r"dominant=40: this model's images have 36 visual tokens"),
    Wrong({"method": "random", "entry": 37}, ValueError, r"entry=37: this model's images have 36"),
    Wrong({"dominant": -3}, ValueError, r"dominant=-3: a token count cannot be negative"),
    Wrong({"dominant": 1.2}, ValueError, r"dominant=1\.2: a float is a fraction in \[0, 1\]"),
    Wrong({"dominant": "half"}, TypeError, r"dominant must be an int \(tokens\) or a float in \[0, 1\] \(fraction\), got 'half'"),
    Wrong({"contextual": 4}, ValueError, r"contextual=4 needs dominant="),
    Wrong({"dominant": 8, "cluster_width": 0}, ValueError, r"cluster_width=0: must be at least 1"),
    Wrong({"schedule": ((8, 0.5),)}, ValueError, r"schedule drops before layer 8, but this decoder has layers 0\.\.7"),
    Wrong({"schedule": ((8, 0.5),)}, ValueError, r"schedule drops before layer 8, but this decoder has layers 0\.\.7", "qwen2_5_vl"),
    Wrong({"schedule": ((-1, 0.5),)}, ValueError, r"layer -1 must be an int >= 0"),
    Wrong({"schedule": ((5, 0.5), (3, 0.2))}, ValueError, r"layers must be strictly increasing"),
    Wrong({"schedule": ((3, 0.5), (3, 0.2))}, ValueError, r"layers must be strictly increasing"),
    Wrong({"schedule": ((3, 0.2), (5, 0.5))}, ValueError, r"a later stage cannot keep more \(0\.5\) than an earlier one \(0\.2\)"),
    Wrong({"schedule": 3}, TypeError, r"schedule must be a sequence of \(layer, keep\) pairs, got 3"),
    Wrong({"schedule": ((3, 1.5),)}, ValueError, r"schedule keep=1\.5"),
    Wrong({"method": "fastv", "layers": 0}, ValueError, r"layers=0: at least one layer must see every token"),
    Wrong({"method": "fastv", "layers": 9}, ValueError, r"layer 9, but this decoder has layers 0\.\.7"),
    Wrong({"method": "fastv", "keep": -1}, ValueError, r"keep=-1: a token count cannot be negative"),
    Wrong({"method": "nobody"}, ValueError, r"unknown method 'nobody'; 'duet-vlm methods' lists those there are"),
    Wrong({"method": 3}, TypeError, r"method must be a name or a Reducer instance, got 3"),
    Wrong({"method": Duet}, TypeError, r"method must be a name or a Reducer instance"),
    Wrong({"budget": 10, "keeep": 3}, ValueError, r"duet has no setting 'keeep'; its settings: .*dominant"),
    Wrong({"budget": 10, "options": {"positions": "packed"}}, ValueError, r"positions='packed': choose one of 'keep', 'compact'"),
    Wrong({"budget": 10, "options": {"text_query": "first"}}, ValueError, r"text_query='first': choose one of 'all', 'last', 'salient'"),
    Wrong({"budget": 10, "options": {"multi_image": "all"}}, ValueError, r"multi_image='all': choose one of 'joint', 'per_image'"),
    Wrong({"budget": 10, "merge": "sum"}, ValueError, r"merge='sum': choose one of 'mean'"),
    Wrong({"budget": 10, "options": {"signal_layer": 7}}, ValueError, r"signal_layer=7: this vision tower has no such layer"),
    Wrong({"budget": 0.5, "options": {"positions": "compact"}}, TypeError, r"positions='compact' cannot work on qwen2_5_vl.*use positions='keep'", "qwen2_5_vl"),
    Wrong({"dominant": 9, "options": {"cls_token": True}}, ValueError, r"cls_token=True needs positions='compact'.*got 'keep'"),
    Wrong({"method": OFFICIAL["duet"]}, TypeError, r"positions='compact' cannot work on qwen2_5_vl", "qwen2_5_vl"),
    Wrong({"method": Duet.official_llava(30, 7)}, ValueError, r"dominant=30 \(CLS included\) \+ contextual=7 rows do not fit"),
    Wrong({"budget": 10, "options": {"text_query": "salient"}, "processor": object()}, TypeError, r"processor= must be the model's processor.*got object"),
]  # fmt: skip


@pytest.mark.parametrize("wrong", AT_ATTACH, ids=str)
def test_wrong_settings_are_refused_at_attach(wrong: Wrong) -> None:
    model = shared(wrong.family)
    before = snapshot(model)
    with pytest.raises(wrong.error, match=wrong.message) as caught:
        duet_vlm.attach(
            model, wrong.settings.get("method", "duet"), **{k: v for k, v in wrong.settings.items() if k != "method"}
        )
    assert caught.value.__cause__ is None and len(str(caught.value).splitlines()) == 1
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "wrong", [w for w in AT_ATTACH if w.family == "llava" and w.settings.get("method", "duet") == "duet"], ids=str
)
def test_wrong_settings_are_refused_by_set_and_the_old_ones_stay(wrong: Wrong) -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs(MIXED)
    if not wrong.settings or "processor" in wrong.settings:
        wrong = Wrong({"budget": None}, BudgetError, r"duet needs a budget")
    with duet_vlm.attach(model, "duet", budget=12) as handle:
        reduced = forward(model, inputs).logits
        own = (
            any(name in wrong.settings for name in ("dominant", "contextual", "schedule"))
            and "budget" not in wrong.settings
        )
        changes = wrong.settings | ({"budget": None} if own or "cls_token" in wrong.settings else {})
        with pytest.raises(wrong.error, match=wrong.message):
            handle.set(**changes)
        assert torch.equal(forward(model, inputs).logits, reduced)


# ---- models that are none of ours


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=20)
    )


def bart() -> nn.Module:
    return AutoModelForSeq2SeqLM.from_config(BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=20,
    ))  # fmt: skip


def named(model_type: str) -> nn.Module:
    """A model that says what it is and has nothing else."""
    model = nn.Module()
    model.config = SimpleNamespace(model_type=model_type)  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("model_type", REASONS)
def test_models_that_cannot_work_are_refused_with_the_reason(model_type: str) -> None:
    assert model_type in CONFIG_MAPPING_NAMES and not any(model_type in cls.model_types for cls in families().values())
    with pytest.raises(
        TypeError,
        match=rf"model_type='{model_type}'\) is not supported: {re.escape(REASONS[model_type])}\. Supported: ",
    ):
        duet_vlm.attach(named(model_type), "duet", budget=0.5)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (llama, "LlamaForCausalLM"),
        (bart, "BartForConditionalGeneration"),
        (lambda: nn.Linear(2, 2), "Linear"),
        (lambda: None, "NoneType"),
    ],
    ids=["decoder", "encoder-decoder", "module", "nothing"],
)
def test_unsupported_models(make: Callable[[], Any], name: str) -> None:
    model = make()
    before = snapshot(model) if model is not None else None
    known = ", ".join(sorted(families()))
    with pytest.raises(
        TypeError,
        match=rf"{name} \(model_type=.*is not supported.*Supported: {known}\. Pass the whole image-text-to-text model",
    ):
        duet_vlm.attach(model, "duet", budget=0.5)
    assert model is None or snapshot(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_the_inner_model_is_refused(family: str) -> None:
    """Without its head a model has the same config, but neither loss nor generate()."""
    model = shared(family)
    before = snapshot(model)
    with pytest.raises(TypeError, match="Pass the whole image-text-to-text model"):
        duet_vlm.attach(model.model, "duet", budget=0.5)
    assert snapshot(model) == before


def test_sliding_decoders_are_refused() -> None:
    model = build("qwen2_5_vl")
    model.config.text_config.layer_types = ["full_attention"] * 4 + ["sliding_attention"] * 4
    with pytest.raises(TypeError, match="set use_sliding_window=False"):
        duet_vlm.attach(model, "duet", budget=0.5)


# ---- wrong calls


def refuse(
    family: str, call: Callable[[nn.Module, dict[str, Any]], Any], error: type[Exception], message: str, **settings: Any
) -> None:
    """``call`` on the attached model raises; afterwards the attached model still works, and detaching leaves the plain
    one."""
    model, good = shared(family), FAMILIES[family].inputs(MIXED)
    plain = forward(model, good).logits
    generate(model, good, 2)
    before = snapshot(model)
    with duet_vlm.attach(model, "duet", **(settings or {"budget": 0.3})):
        reduced = forward(model, good).logits
        with pytest.raises(error, match=message):
            call(model, FAMILIES[family].inputs([ONE, TWO]))
        assert torch.equal(forward(model, good).logits, reduced)
    assert snapshot(model) == before
    assert torch.equal(forward(model, good).logits, plain)


def without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key not in names}


@pytest.mark.parametrize("call", [forward, generate])
@pytest.mark.parametrize("family", FAMILIES)
def test_placeholders_without_images(family: str, call: Any) -> None:
    message = r"sample 0 has \d+ image placeholders in its text, but no image was passed: pass images to the processor"
    refuse(
        family,
        lambda m, i: call(m, without(i, "pixel_values", "image_grid_thw", "mm_token_type_ids")),
        ValueError,
        message,
    )


def test_an_encoder_call_with_other_rows_than_the_config_says() -> None:
    """Tokens are chosen inside the tower, among the rows that the model is set to use."""
    model, inputs = shared("llava"), FAMILIES["llava"].inputs([ONE])
    with duet_vlm.attach(model, "duet", budget=0.5) as handle:
        with pytest.raises(
            RuntimeError,
            match=r"chosen among \[36\], but the encoder made \[37\] .* model's config, or use handle.paused",
        ):
            model.model.get_image_features(inputs["pixel_values"], vision_feature_select_strategy="full")
        with handle.paused():
            model.model.get_image_features(inputs["pixel_values"], vision_feature_select_strategy="full")
        forward(model, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_without_placeholders(family: str) -> None:
    """The stock model's own check comes first and speaks of features and tokens."""

    def call(model: nn.Module, inputs: dict[str, Any]) -> None:
        inputs["input_ids"][1] = torch.where(inputs["input_ids"][1] == IMAGE, 17, inputs["input_ids"][1])
        forward(model, without(inputs, "mm_token_type_ids"))

    refuse(family, call, ValueError, "tokens|placeholders")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_that_straddles_two_samples(family: str) -> None:
    """The totals agree, so the stock model would take it and see the wrong pixels."""

    def call(model: nn.Module, inputs: dict[str, Any]) -> None:
        ids = inputs["input_ids"]
        moved = (ids[1] == IMAGE).nonzero()[0, 0]
        ids[1, moved] = 17
        ids[0, (ids[0] == 7).nonzero()[0, 0]] = IMAGE
        if FAMILIES[family].mrope:  # the position code of the stock model would stumble first
            inputs["position_ids"] = torch.arange(ids.shape[1]).expand(3, *ids.shape)
        forward(model, without(inputs, "mm_token_type_ids"))

    message = r"sample 0 has \d+ image placeholders, but its images make \d+ visual tokens.*one processor call"
    refuse(family, call, ValueError, message)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [8, 100])
def test_chunked_prefill(family: str, size: int) -> None:
    message = rf"prefill_chunk_size={size}: tokens cannot be ranked by half a prompt; leave it None, or use handle\.paused\(\)"
    refuse(family, lambda m, i: generate(m, i, prefill_chunk_size=size), ValueError, message)
    refuse(family, lambda m, i: generate(m, i, prefill_chunk_size=size), ValueError, message, schedule=((4, 0.5),))


@pytest.mark.parametrize("family", FAMILIES)
def test_static_cache(family: str) -> None:
    def call(model: nn.Module, inputs: dict[str, Any]) -> None:
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=256)
        forward(model, inputs, past_key_values=cache, use_cache=True)

    refuse(
        family,
        call,
        ValueError,
        r"static \(compilable\) caches .*use the default dynamic cache or detach; handle.static_cache makes",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_a_static_cache(family: str) -> None:
    # transformers notes things on the model
    generate(shared(family), FAMILIES[family].inputs(MIXED), 2, cache_implementation="static")
    refuse(
        family, lambda m, i: generate(m, i, cache_implementation="static"), ValueError, r"static \(compilable\) caches"
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_pixels_that_are_not_finite(family: str, value: float) -> None:
    def call(model: nn.Module, inputs: dict[str, Any]) -> None:
        inputs["pixel_values"][-1] = value
        generate(model, inputs)

    refuse(family, call, ValueError, "NaN or Inf.*Check the input image, the weights and the dtype")
    refuse(family, call, ValueError, "NaN or Inf.*Check the input image", schedule=((4, 0.5),))


@pytest.mark.parametrize("family", FAMILIES)
def test_salient_without_processor(family: str) -> None:
    model, options = shared(family), TokenOptions(text_query="salient")
    before = snapshot(model)
    with pytest.raises(ValueError, match="text_query='salient' reads the words of the question: pass processor="):
        duet_vlm.attach(model, "duet", schedule=((4, 0.5),), options=options)
    assert snapshot(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_new_image_on_a_reduced_cache(family: str) -> None:
    def call(model: nn.Module, inputs: dict[str, Any]) -> None:
        cache = forward(model, inputs, use_cache=True).past_key_values
        mask = torch.cat([inputs["attention_mask"]] * 2, 1)
        forward(model, inputs | {"attention_mask": mask}, past_key_values=cache)

    refuse(
        family,
        call,
        ValueError,
        r"new image on a reduced cache: start a new conversation \(no past_key_values\) or detach",
    )


@pytest.mark.parametrize("family", ["llava", "llava_gqa"])  # Qwen's own position code fails before
def test_new_image_on_a_cache_of_text(family: str) -> None:
    def call(model: nn.Module, inputs: dict[str, Any]) -> None:
        cache = forward(model, FAMILIES[family].inputs([TEXT, TEXT]), use_cache=True).past_key_values
        mask = torch.cat([torch.ones(2, 6).long(), inputs["attention_mask"]], 1)
        forward(model, inputs | {"attention_mask": mask}, past_key_values=cache)

    refuse(family, call, ValueError, r"new image on a cache that already holds tokens: start a new conversation")


@pytest.mark.parametrize("family", FAMILIES)
def test_full_ids_on_a_v2v_reduced_cache(family: str) -> None:
    def call(model: nn.Module, inputs: dict[str, Any]) -> None:
        first = generate(model, inputs, 3)
        ids = torch.cat([first.sequences, torch.full((2, 2), 33)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5).long()], 1)
        model.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=2)

    refuse(family, call, ValueError, r"reduced cache represents \d+ tokens.*pass only the new token ids")


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_mask_of_the_wrong_length_in_decode(family: str) -> None:
    def call(model: nn.Module, inputs: dict[str, Any]) -> None:
        cache = forward(model, inputs, use_cache=True).past_key_values
        forward(
            model,
            {"input_ids": torch.full((2, 1), 33), "attention_mask": inputs["attention_mask"]},
            past_key_values=cache,
        )

    refuse(family, call, ValueError, r"attention_mask covers \d+ tokens and 1 new ones were passed")


@pytest.mark.parametrize("family", FAMILIES)
def test_prepared_masks_in_decode(family: str) -> None:
    def call(model: nn.Module, inputs: dict[str, Any]) -> None:
        cache = forward(model, inputs, use_cache=True).past_key_values
        mask = torch.zeros(2, 1, 1, inputs["input_ids"].shape[1] + 1)
        forward(model, {"input_ids": torch.full((2, 1), 33), "attention_mask": mask}, past_key_values=cache)

    refuse(family, call, ValueError, r"decoding on a reduced cache takes a 2-D attention mask or none")


@pytest.mark.parametrize("family", ["llava", "llava_gqa"])  # Qwen's own position code fails before
def test_attention_mask_of_the_wrong_length_in_the_prompt(family: str) -> None:
    message = r"attention_mask has shape \(2, \d+\), the prompt \(2, \d+\)"
    refuse(family, lambda m, i: forward(m, i | {"attention_mask": i["attention_mask"][:, 1:]}), ValueError, message)


@pytest.mark.parametrize("kept", [1, torch.tensor([0, 3])], ids=["number", "positions"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_to_keep_with_labels(family: str, kept: Any) -> None:
    message = r"logits_to_keep cannot be combined with labels while tokens are dropped"

    def run(model, inputs):
        return forward(
            model, inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == PAD, -100), logits_to_keep=kept
        )

    refuse(family, run, ValueError, message)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_alone(family: str) -> None:
    def call(model: nn.Module, inputs: dict[str, Any]) -> None:
        forward(
            model,
            {
                "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]),
                "attention_mask": inputs["attention_mask"],
            },
        )

    refuse(
        family,
        call,
        ValueError,
        r"inputs_embeds without input_ids and without images.*Pass input_ids and pixel_values .*handle\.paused\(\)",
    )


def test_videos() -> None:
    def call(model: nn.Module, inputs: dict[str, Any]) -> None:
        forward(model, inputs, mm_encoder_outputs={"video": inputs["pixel_values"]})

    refuse(
        "llava",
        call,
        ValueError,
        r"llava: video inputs are not supported yet: use handle\.paused\(\) for this call, or detach",
    )


def test_floors_of_free_sizes_are_found_before_any_layer_runs() -> None:
    """Qwen's images have any size, so a budget below a floor shows at the first call."""
    model, ran = shared("qwen2_5_vl"), []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda *a: ran.append(1))
    with (
        duet_vlm.attach(model, "fastv", budget=1),
        pytest.raises(BudgetError, match="cannot reach 1 .*span of 20 tokens.*floor is 2.5") as caught,
    ):
        forward(model, FAMILIES["qwen2_5_vl"].inputs([ONE]))
    hook.remove()
    assert caught.value.floor == 2.5 and not ran


@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
def test_models_that_are_compiled_as_a_whole(how: str) -> None:
    model = build("llava")
    if how == "model.compile":
        model.compile(backend="eager")
    given = torch.compile(model, backend="eager") if how == "torch.compile" else model
    before = snapshot(model)
    with pytest.raises(
        TypeError,
        match=r"this LlavaForConditionalGeneration is compiled as a whole .* compile the decoder layers instead",
    ):
        duet_vlm.attach(given, "duet", budget=0.5)
    assert snapshot(model) == before


# ---- the handle


def test_a_handle_that_nobody_kept() -> None:
    model, inputs = build("llava"), FAMILIES["llava"].inputs([ONE])
    plain = forward(model, inputs).logits
    before = snapshot(model)
    assert duet_vlm.handle_of(model) is None
    duet_vlm.detach(model)  # harmless
    duet_vlm.attach(model, "duet", budget=12)
    gc.collect()
    reduced = forward(model, inputs).logits
    found = duet_vlm.handle_of(model)
    assert (
        found is not None
        and found.budget == 12
        and found.report().batch == 1
        and not torch.equal(reduced[:, -1], plain[:, -1])
    )
    with pytest.raises(ValueError, match=r"duet_vlm\.detach\(model\) if nobody kept it"):
        duet_vlm.attach(model, "fastv")
    duet_vlm.detach(model)
    assert duet_vlm.handle_of(model) is None and snapshot(model) == before
    assert torch.equal(forward(model, inputs).logits, plain)


def test_a_model_takes_its_handle_along() -> None:
    model = build("llava")
    duet_vlm.attach(model, "duet", budget=12)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_report_and_trace_before_any_run() -> None:
    model = shared("llava")
    with duet_vlm.attach(model, "duet", budget=12) as handle:
        forward(model, FAMILIES["llava"].inputs([TEXT]))
        for read in (handle.report, lambda: handle.trace, lambda: handle.slots):
            with pytest.raises(
                RuntimeError, match="nothing to report yet: run the attached model on a prompt with an image first"
            ):
                read()


def test_a_detached_handle() -> None:
    model = shared("llava")
    handle = duet_vlm.attach(model, "duet", budget=12)
    handle.detach()
    for use in (lambda: handle.set(budget=13), lambda: handle.paused().__enter__(), lambda: handle.__enter__()):
        with pytest.raises(RuntimeError, match=r"this handle is detached: call attach\(\) again"):
            use()


def test_signals_cannot_change_while_attached() -> None:
    with (
        duet_vlm.attach(shared("llava"), "duet", budget=12) as handle,
        pytest.raises(ValueError, match="signal_layer cannot change while attached"),
    ):
        handle.set(options=TokenOptions(signal_layer=0))


# ---- the registry


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match=r"method name 'My Method': use lower-case letters"):
        duet_vlm.register("My Method")
    with pytest.raises(TypeError, match="is not a Reducer: derive from duet_vlm.EncoderReducer"):
        duet_vlm.register("mine")(int)  # type: ignore[type-var]
    with pytest.raises(
        ValueError, match=r"method 'fastv' is already registered by duet_vlm\.methods\.decoder\.fastv\.FastV"
    ):
        duet_vlm.register("fastv")(type("Other", (FastV,), {}))
    assert duet_vlm.get_method("fastv") is FastV


def test_two_models_that_share_a_tower() -> None:
    first, second = build("llava"), build("llava")
    second.model.vision_tower = first.model.vision_tower
    forward(second, FAMILIES["llava"].inputs([ONE]))
    before = snapshot(second)
    with duet_vlm.attach(first, "duet", budget=12):
        with pytest.raises(ValueError, match="another model uses this vision tower already"):
            duet_vlm.attach(second, "duet", budget=12)
    assert snapshot(second) == before
    with duet_vlm.attach(second, "duet", budget=12):
        forward(second, FAMILIES["llava"].inputs([ONE]))


@pytest.mark.parametrize("processor", ["llava-hf/llava-1.5-7b-hf", 3])
@pytest.mark.parametrize("method", ["duet", "scope", "fastv"])
def test_what_is_no_processor_is_refused_whatever_asks_for_one(method: str, processor: Any) -> None:
    with pytest.raises(
        TypeError, match=r"processor= must be the model's processor \(with a tokenizer\), got (str|int)"
    ):
        duet_vlm.attach(shared("llava"), method, budget=0.3, processor=processor)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    ["model.compile", *(pytest.param(how, marks=pytest.mark.slow) for how in ("torch.compile", "decoder", "paused"))],
)
def test_models_that_are_compiled_while_attached(how: str) -> None:
    """The first prompt is refused, not the second of another length; and nothing is left behind."""
    model, made = build("llava"), FAMILIES["llava"]
    prompts: list[Any] = [
        made.inputs([(1, 5, Picture(1, 4, 5), 7, 8)]),
        made.inputs([(1, Picture(2, 3, 4), 11, 12, 13, 14, 15)]),
    ]
    plain = [forward(model, inputs).logits for inputs in prompts]
    torch._dynamo.reset()
    with (
        duet_vlm.attach(model, "duet", budget=0.4) as handle,
        handle.paused() if how == "paused" else contextlib.nullcontext(),
    ):
        run = torch.compile(model, backend="eager") if how == "torch.compile" else model
        if how != "torch.compile":
            (made.text(model) if how == "decoder" else model).compile(backend="eager")
        for inputs in prompts:
            message = (
                "is compiled as a whole while a reducer is attached, .* compile the decoder layers instead .* or detach"
            )
            with torch.no_grad(), pytest.raises(ValueError, match=message):
                run(**inputs)
    with torch.no_grad():
        for inputs, logits in zip(prompts[:1], plain, strict=False):
            torch.testing.assert_close(run(**inputs).logits, logits)


@pytest.mark.parametrize("method", ["duet", "fastv", "contrast+duet_plus"])
@pytest.mark.parametrize("how", ["forward", "features", "paused", "generate"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_model_that_is_called_from_inside_its_own_tower(name: str, how: str, method: str) -> None:
    """One error says so, whatever the hook calls; text, and a call from a hook of the decoder, are right."""
    model, inputs = build(name), FAMILIES[name].inputs([ONE])
    others, text = FAMILIES[name].inputs([TWO]), {"input_ids": torch.tensor([[5, 6, 7]])}
    plain, said = forward(model, text).logits, []
    with duet_vlm.attach(model, method, budget=0.5) as handle:
        expected, nested = forward(model, inputs).logits, forward(model, others).logits

        def again() -> None:
            if how == "forward":
                said.append(model(**others).logits)
            elif how == "features":
                model.model.get_image_features(
                    **{k: v for k, v in others.items() if k in ("pixel_values", "image_grid_thw")}
                )
            elif how == "generate":
                model.generate(**others, max_new_tokens=1)
            else:
                with handle.paused():
                    model(**others)

        blocks = handle.adapter.vision_attention(None)
        calling: list[int] = []

        def hook(*_: Any, call: Any) -> None:
            if not calling:
                calling.append(1)
                try:
                    call()
                finally:
                    calling.clear()

        taken = blocks.register_forward_hook(functools.partial(hook, call=again))
        with (
            torch.no_grad(),
            pytest.raises(RuntimeError, match="was called with pictures from inside its own vision tower"),
        ):
            model(**inputs)
        taken.remove()
        taken = blocks.register_forward_hook(functools.partial(hook, call=lambda: said.append(model(**text).logits)))
        assert torch.equal(forward(model, inputs).logits, expected) and torch.equal(said.pop(), plain)
        taken.remove()
        if how == "forward":
            taken = handle.adapter.layers[3].register_forward_hook(functools.partial(hook, call=again))
            assert torch.equal(forward(model, inputs).logits, expected) and torch.equal(said.pop(), nested)
            taken.remove()
