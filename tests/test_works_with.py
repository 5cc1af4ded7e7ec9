"""Other people's tools around an attached model, the real ones: bitsandbytes, torchao, PEFT, pipelines, offloading,
compressed caches.

References are plain models: weights dequantised or merged beforehand, the stock decoder on the same cache. Servers:
test_serve.py; training: test_trainers.py; what accelerate puts around models of every family: test_wrappers.py; static
caches: test_static.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, DynamicCache, LlavaForConditionalGeneration, TorchAoConfig, pipeline

import duet_vlm
from duet_vlm.evaluation import tiny
from duet_vlm.reducers.options import TokenOptions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from press import pressed  # noqa: E402

METHODS = ("duet", "scope", "fastv", "divprune")  # ranked by attention of the tower, of the decoder, by projected rows
BUDGET = 0.33


@pytest.fixture
def inputs() -> Any:
    return encoded(0)


def encoded(*numbers: int) -> Any:
    """Questions of the embedded task, as its model wants them."""
    _, processor = tiny.load()
    asked = tiny.samples("test", 8)
    images, texts = [asked[n].image for n in numbers], [tiny.prompt(asked[n].question) for n in numbers]
    return processor(images=images, text=texts, return_tensors="pt", padding=True)


def answered(model: Any, inputs: Any, method: str, **fields: Any) -> tuple[Tensor, Any]:
    """Logits of a few greedy steps, and what was kept on the way."""
    with duet_vlm.attach(model, method, budget=BUDGET, **fields) as handle, torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert handle.report().measured_mean <= BUDGET * 256 + 1
        return torch.stack(output.logits), handle.trace


def stock(model: Any, inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def check_like(model: Any, plain: Any, inputs: Any, method: str) -> None:
    """The attached model chooses and says what the attached plain one does, and is itself again afterwards."""
    before = stock(model, inputs)
    found, kept = answered(model, inputs, method)
    expected, wanted = answered(plain, inputs, method)
    assert kept == wanted
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
    assert torch.equal(stock(model, inputs), before)


class Product(nn.Module):
    """What a linear layer computes, and nothing else that could be asked of it: no weight, no type."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.run = layer.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


BITS = {
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    8: {"load_in_8bit": True},
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", METHODS)
def test_bitsandbytes(method: str, bits: int, inputs: Any) -> None:
    """NF4 and LLM.int8 on the CPU. The reference has the same products behind layers that say nothing of themselves,
    and both are near the model in float32: nothing but the quantised kernels is between them."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    settings: Any = {"quantization_config": BitsAndBytesConfig(**BITS[bits]), "dtype": torch.float32}
    model = LlavaForConditionalGeneration.from_pretrained(tiny.path(), **settings)
    other = LlavaForConditionalGeneration.from_pretrained(tiny.path(), **settings)
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    layers = [(name, layer) for name, layer in other.named_modules() if isinstance(layer, kinds)]
    assert len(layers) > 100
    for name, layer in layers:
        parent, _, own = name.rpartition(".")
        setattr(other.get_submodule(parent), own, Product(layer))
    check_like(model, other, inputs, method)
    exact, _ = tiny.load()
    assert torch.equal(answered(model, inputs, method)[0].argmax(-1), answered(exact, inputs, method)[0].argmax(-1))


@pytest.mark.parametrize("loaded", [False, True], ids=["quantize_", "from_pretrained"])
@pytest.mark.parametrize("method", METHODS)
def test_eight_bits_of_torchao(method: str, loaded: bool, inputs: Any) -> None:
    """Int8 weights, quantised in place and while loading. The reference is a plain model with the dequantised weights;
    its head, which shares its weights with the embeddings, gets some of its own, because torchao leaves the embeddings
    as they are."""
    quantization = pytest.importorskip("torchao.quantization", reason="make test-torchao runs it")
    eight = quantization.Int8WeightOnlyConfig()
    if loaded:
        model = LlavaForConditionalGeneration.from_pretrained(
            tiny.path(), quantization_config=TorchAoConfig(eight), dtype=torch.float32
        )
    else:
        model, _ = tiny.load()
        quantization.quantize_(model, eight)
    plain, _ = tiny.load()
    count = 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and type(layer.weight) is not nn.Parameter:
            plain.get_submodule(name).weight = nn.Parameter(layer.weight.dequantize())
            count += 1
    assert count > 100
    check_like(model, plain, inputs, method)
    exact, _ = tiny.load()
    assert not torch.equal(answered(exact, inputs, method)[0], answered(model, inputs, method)[0])  # it is quantised


@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_peft(method: str, inputs: Any) -> None:
    """Attached to the wrapper; the plain model has the adapters merged into its weights."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    settings = peft.LoraConfig(r=4, target_modules=r".*language_model.*(q|k|v)_proj", init_lora_weights=False)
    base, _ = tiny.load()
    model = peft.get_peft_model(base, settings).eval()
    state = {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}
    other, _ = tiny.load()
    twin = peft.get_peft_model(other, settings)
    peft.set_peft_model_state_dict(twin, state)
    check_like(model, twin.merge_and_unload().eval(), inputs, method)
    bare, _ = tiny.load()
    assert not torch.equal(answered(bare, inputs, method)[0], answered(model, inputs, method)[0])  # the adapters matter


@pytest.mark.parametrize("method", METHODS)
def test_weights_on_disk(method: str, inputs: Any, tmp_path: Path) -> None:
    """``from_pretrained(device_map=...)`` with the decoder on disk: the same bits."""
    places = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.language_model": "disk",
        "lm_head": "disk",
    }
    options: dict[str, Any] = {"device_map": places, "offload_folder": str(tmp_path), "dtype": torch.float32}
    model = LlavaForConditionalGeneration.from_pretrained(tiny.path(), **options)
    assert any(weight.is_meta for weight in model.parameters())
    plain, _ = tiny.load()
    found, kept = answered(model, inputs, method)
    expected, wanted = answered(plain, inputs, method)
    assert kept == wanted and torch.equal(found, expected)


def test_the_pipeline_of_transformers() -> None:
    """It answers what generate() does, in batches too, and the report is that of its last call."""
    model, processor = tiny.load()
    asked = tiny.samples("test", 3)
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": s.image}, {"type": "text", "text": s.question}]}]
        for s in asked
    ]
    with duet_vlm.attach(model, "duet", budget=BUDGET) as handle:
        said = [
            one[0]["generated_text"] for one in ask(text=chats, max_new_tokens=4, return_full_text=False, batch_size=1)
        ]
        tokens = handle.report().measured_mean
        for sample, answer in zip(asked, said, strict=True):
            given = processor(images=sample.image, text=tiny.prompt(sample.question), return_tensors="pt")
            out = model.generate(**given, max_new_tokens=4)[0, given["input_ids"].shape[1] :]
            assert answer.strip() == processor.decode(out, skip_special_tokens=True).strip()
    assert 0 < tokens <= BUDGET * 256
    assert said[0].strip() == asked[0].answer


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("method", ("duet", "visionzip", "fastv"))
def test_a_cache_that_others_compress(method: str, masked: bool, inputs: Any) -> None:
    """Behind a prompt without padding: steps equal those of the stock decoder on the same keys, at the positions that
    the prompt has."""
    model, _ = tiny.load()
    with duet_vlm.attach(model, method, budget=BUDGET), torch.no_grad():
        with pressed(model, 0.5):
            first = model(**inputs, use_cache=True)
        cache, token = first.past_key_values, first.logits[:, -1:].argmax(-1)
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        by_hand = DynamicCache(config=model.config.text_config)
        for index, layer in enumerate(cache.layers):
            by_hand.update(layer.keys.clone(), layer.values.clone(), index)
        mask, found = inputs["attention_mask"], []
        for _ in range(3):
            mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
            found.append(
                model(
                    input_ids=token, attention_mask=mask if masked else None, past_key_values=cache, use_cache=True
                ).logits
            )
            token = found[-1].argmax(-1)
    with duet_vlm.attach(model, method, budget=BUDGET) as handle, torch.no_grad():
        whole = model(**inputs, use_cache=True).past_key_values
        assert lengths == [round(0.5 * layer.keys.shape[2]) for layer in whole.layers]
        assert handle.report().measured_mean > 0
    token, prompt = first.logits[:, -1:].argmax(-1), inputs["input_ids"].shape[1]
    with torch.no_grad():
        for step, logits in enumerate(found):
            place = torch.tensor([[prompt + step]])
            expected = model(input_ids=token, position_ids=place, past_key_values=by_hand, use_cache=True).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            token = expected.argmax(-1)


@pytest.mark.parametrize("method", ("duet", "visionzip"))
def test_a_compressed_cache_of_a_padded_batch_is_refused(method: str) -> None:
    """Which of its rows are padding nobody knows any more."""
    model, _ = tiny.load()
    batch = encoded(0, 1, 2, 3)
    assert not batch["attention_mask"].all()
    with (
        duet_vlm.attach(model, method, budget=BUDGET),
        pressed(model, 0.5),
        pytest.raises(ValueError, match="compressed by others.*without padding"),
    ):
        model.generate(**batch, max_new_tokens=3)


def test_a_compressed_cache_cannot_be_cut_as_well(inputs: Any) -> None:
    """``trim_kv_cache=True`` takes rows by their number, which a compressed cache has lost."""
    model, _ = tiny.load()
    with duet_vlm.attach(model, "duet", budget=BUDGET, options=TokenOptions(trim_kv_cache=True)), pressed(model, 0.5):
        with pytest.raises(ValueError, match="trim_kv_cache=True needs a cache"):
            model.generate(**inputs, max_new_tokens=3)
