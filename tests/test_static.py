"""Static caches behind a reduced prompt: the same answers as with the dynamic cache, sizes by the plan, one graph for
prompts of one size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, MIXED, ONE, TWO, Inputs, build, forward, generate, shared
from method_matrix import Case, matrix
from torch import Tensor
from transformers import DynamicCache

import duet_vlm
from duet_vlm.evaluation import tiny
from duet_vlm.models.lookup import adapter_for

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
ROOM = 6


def read(model: Any, inputs: Inputs) -> tuple[Any, Tensor]:
    """The prompt's cache and the likeliest next tokens."""
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
    return output.past_key_values, output.logits[:, -1:].argmax(-1)


def write(model: Any, cache: Any, token: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Logits of that many greedy steps, by hand."""
    found = []
    for _ in range(steps):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        with torch.no_grad():
            logits = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1:]
        found.append(logits)
        token = logits.argmax(-1)
    return torch.cat(found, 1)


def able(family: str) -> bool:
    return set(adapter_for(shared(family)).layer_types) == {"full_attention"}


@matrix("duet", "fastv", "visionzip", "pyramiddrop")
def test_a_static_cache_decodes_what_the_dynamic_one_does(case: Case) -> None:
    model, inputs = case.model(), FAMILIES[case.family].inputs(MIXED)
    with case.attach() as handle:
        cache, token = read(model, inputs)
        if not able(case.family):
            with pytest.raises(ValueError, match="full attention, and .* has others .*: use a dynamic cache"):
                handle.static_cache(cache, ROOM)
            return
        static = handle.static_cache(cache, ROOM)
        assert [layer.max_cache_len - ROOM for layer in static.layers] == [
            layer.keys.shape[2] for layer in cache.layers
        ]
        assert not static.is_compileable  # generate() is to leave the model as it is
        expected = write(model, cache, token, inputs["attention_mask"], ROOM)
        found = write(model, static, token, inputs["attention_mask"], ROOM)
        torch.testing.assert_close(found, expected, **CLOSE)
        with pytest.raises(
            ValueError, match=rf"room for {ROOM} tokens after its prompt, and {ROOM + 1} are written: make it larger"
        ):
            write(
                model, static, token, torch.cat([inputs["attention_mask"], torch.ones(len(token), ROOM).long()], 1), 1
            )


@matrix("duet", "fastv", attention=("sdpa",))
def test_generate_goes_on_with_a_static_cache(case: Case) -> None:
    """The first token from the prompt, the others by generate() on the cache that was made of it."""
    if not able(case.family):
        pytest.skip("no static caches there")
    model, inputs = case.model(), FAMILIES[case.family].inputs([ONE, TWO])
    with case.attach() as handle:
        expected = generate(model, inputs, 4)
        first = generate(model, inputs, 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1).long()], 1)
        static = handle.static_cache(first.past_key_values, 4)
        rest = generate(
            model, {"input_ids": first.sequences[:, -1:], "attention_mask": mask}, 3, past_key_values=static
        )
    assert torch.equal(rest.sequences[:, 1:], expected.sequences[:, -3:])


def test_rows_keep_their_prompts() -> None:
    """A static copy of a reordered cache is reordered, too."""
    model, inputs = shared("llava"), FAMILIES["llava"].inputs([ONE, TWO])
    order = torch.tensor([1, 0, 1])
    with duet_vlm.attach(model, "duet", dominant=6, contextual=2) as handle:
        cache, token = read(model, inputs)
        cache.reorder_cache(order)
        static = handle.static_cache(cache, 3)
        mask = inputs["attention_mask"][order]
        torch.testing.assert_close(
            write(model, static, token[order], mask, 3), write(model, cache, token[order], mask, 3), **CLOSE
        )


def test_one_graph_serves_all_prompts_of_a_size() -> None:
    """Compiled layers: one graph of each for decoding, whatever the picture and the question, while the static sizes
    are the same."""
    model, processor = tiny.load()
    graphs: list[int] = []

    def counted(graph: Any, _: Any) -> Any:
        graphs.append(1)
        return graph.forward

    samples = tiny.samples("test", 6)
    encoded = [processor(images=one.image, text=tiny.prompt(one.question), return_tensors="pt") for one in samples]
    longest = max(one["input_ids"].shape[1] for one in encoded)
    # questions differ in length, what is missing goes to the room
    assert len({one["input_ids"].shape[1] for one in encoded}) > 1
    made = []
    torch._dynamo.reset()
    limit = torch._dynamo.config.patch(recompile_limit=64)  # more than there are layers: each has a number, so a graph
    with limit, duet_vlm.attach(model, "duet", budget=0.33) as handle:
        prompts = [read(model, one) for one in encoded]
        expected = [
            write(model, cache, token, one["attention_mask"], 4)
            for one, (cache, token) in zip(encoded, prompts, strict=True)
        ]
        prompts = [read(model, one) for one in encoded]
        for layer in model.model.language_model.layers:
            layer.forward = torch.compile(layer.forward, backend=counted)
        for one, (cache, token) in zip(encoded, prompts, strict=True):
            static = handle.static_cache(cache, 4 + longest - one["input_ids"].shape[1])
            made.append((write(model, static, token, one["attention_mask"], 4), len(graphs)))
    torch._dynamo.reset()
    assert [count for _, count in made] == [12] * len(samples)
    for (found, _), wanted in zip(made, expected, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("new", [0, -1, 2.0, True, None])
def test_how_many_may_follow_is_a_number_of_tokens(new: Any) -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs([ONE])
    with duet_vlm.attach(model, "fastv", budget=0.5) as handle:
        cache, _ = read(model, inputs)
        with pytest.raises(
            ValueError, match=r"max_new_tokens=.*: how many tokens may still be written, a whole number from 1 on"
        ):
            handle.static_cache(cache, new)


def test_what_holds_no_prompt_cannot_be_made_static() -> None:
    model, inputs = build("llava"), FAMILIES["llava"].inputs([ONE])
    with duet_vlm.attach(model, "fastv", budget=0.5) as handle:
        cache, _ = read(model, inputs)
        with pytest.raises(ValueError, match="StaticLayer does not"):
            handle.static_cache(handle.static_cache(cache, 2), 2)
        empty = DynamicCache(config=model.config.get_text_config())
        with pytest.raises(ValueError, match="DynamicLayer does not"):
            handle.static_cache(empty, 2)
        model.config.get_text_config()._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="load the model with sdpa or eager attention"):
            handle.static_cache(cache, 2)
    model.config.get_text_config()._attn_implementation = "sdpa"
    with pytest.raises(RuntimeError, match="detached"):
        handle.static_cache(cache, 2)


def test_a_whole_prompt_has_a_static_cache_as_well() -> None:
    """Nothing was reduced: the cache is an ordinary static one, for the stock model after detach(), too."""
    model, inputs = shared("llava"), FAMILIES["llava"].inputs([TWO])
    with duet_vlm.attach(model, "none") as handle:
        cache, token = read(model, inputs)
        static = handle.static_cache(cache, 3)
    assert forward(model, inputs).logits.shape[1] == cache.get_seq_length()
    found, expected = (write(model, one, token, inputs["attention_mask"], 3) for one in (static, cache))
    torch.testing.assert_close(found, expected, **CLOSE)
