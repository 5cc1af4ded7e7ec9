"""Conversations, streaming, threads, assisted decoding: what generate() does beyond one prompt."""

from __future__ import annotations

import contextlib
import copy
import threading
from typing import Any

import pytest
import torch
from families import FAMILIES, FIRST, MIXED, ONE, TEXT, TWO, Inputs, build, forward, generate, shared
from method_matrix import Case, matrix
from reference_forward import Choice, choices_of, step_logits, walk_batch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import duet_vlm

CLOSE = {"rtol": 1e-3, "atol": 2e-4}


def conversation(case: Case, inputs: Inputs, full_ids: bool) -> tuple[list[Tensor], Tensor, list[Choice]]:
    """Two turns: the logits of the second, everything said after the prompt, and the choices of the first."""
    model = case.model()
    width = inputs["input_ids"].shape[1]
    with case.attach() as handle:
        first = generate(model, inputs, 4)
        question = torch.tensor([[41, 42, 43], [44, 45, 46]])
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4 + 3).long()], 1)
        ids = torch.cat([first.sequences, question], 1)
        # the last sampled token is not in the cache yet
        given = ids if full_ids else torch.cat([first.sequences[:, -1:], question], 1)
        second = generate(model, {"input_ids": given, "attention_mask": mask}, 4, past_key_values=first.past_key_values)
        choices = choices_of(handle)
    said = torch.cat([ids[:, width:], second.sequences[:, given.shape[1] :]], 1)
    return list(second.logits), said, choices


@matrix("fastv", "pyramiddrop", attention=("sdpa",), full_ids={"all ids": True, "new ids": False})
def test_second_turn_without_v2v(case: Case, full_ids: bool) -> None:
    check_second_turn(case, full_ids)


@matrix("duet", "visionzip")
def test_second_turn_with_v2v(case: Case) -> None:
    """Layer 0 is reduced too, so the uncached ids are passed, with the mask of the whole conversation."""
    check_second_turn(case, full_ids=False)


def check_second_turn(case: Case, full_ids: bool) -> None:
    inputs = FAMILIES[case.family].inputs([ONE, TWO])
    logits, said, choices = conversation(case, inputs, full_ids)
    walks = walk_batch(shared(case.family, "eager"), inputs, choices, said)
    for step, expected in enumerate(step_logits(walks, choices, 11)[7:]):
        torch.testing.assert_close(logits[step], expected, **CLOSE)


@matrix("duet", "fastv", attention=("sdpa",))
def test_manual_decoding_without_positions(case: Case) -> None:
    """A loop of one's own: several draft tokens at once, no mask where nothing is padded, no position ids."""
    inputs, model = FAMILIES[case.family].inputs([ONE]), case.model()
    steps = [torch.tensor([[33]]), torch.tensor([[34, 35, 36]]), torch.tensor([[37]])]
    with case.attach() as handle:
        cache = forward(model, inputs, use_cache=True).past_key_values
        choices = choices_of(handle)
        logits = torch.cat(
            [forward(model, {"input_ids": new}, past_key_values=cache, use_cache=True).logits for new in steps], 1
        )
    said = torch.cat(steps, 1)
    walk = walk_batch(shared(case.family, "eager"), inputs, choices, said)[0]
    torch.testing.assert_close(logits[0], walk.logits[choices[0].slots :], **CLOSE)


@matrix("duet", "fastv", attention=("sdpa",))
def test_a_copied_cache_goes_its_own_way(case: Case) -> None:
    inputs, model = FAMILIES[case.family].inputs([ONE, TWO]), case.model()
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1).long()], 1)
    with case.attach():
        cache = forward(model, inputs, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        step = {"input_ids": torch.tensor([[33], [34]]), "attention_mask": mask}
        first = forward(model, step, past_key_values=cache).logits
        forward(model, step | {"attention_mask": torch.cat([mask, mask[:, :1]], 1)}, past_key_values=cache)
        assert torch.equal(forward(model, step, past_key_values=twin).logits, first)


def stock_model_takes_no_drafts(case: Case) -> None:
    """Drafts change what stands in front of them, or the cache cannot give them up again: without us, too."""
    made, model = FAMILIES[case.family], case.model()
    before = forward(model, made.inputs([ONE])).logits[:, -1]
    output = forward(model, made.inputs([(*ONE, 61, 62, 63)]), use_cache=True)
    if torch.allclose(output.logits[:, -4], before, **CLOSE):
        with pytest.raises(RuntimeError, match="crop"):
            output.past_key_values.crop(-3)


@matrix("duet", "fastv", "visionzip", attention=("sdpa",))
def test_prompt_lookup_equals_greedy(case: Case) -> None:
    row = (*ONE, 50, 51, 52, 50, 51, 52, 50, 51)  # something to look up
    inputs, model = FAMILIES[case.family].inputs([row]), case.model()
    if case.family == "paligemma":
        stock_model_takes_no_drafts(case)  # its prefix sees them
        return
    if getattr(model, "_is_stateful", False):
        with (
            case.attach(),
            pytest.raises(ValueError, match="assisted generation is not supported with stateful models"),
        ):
            generate(model, inputs, 10, prompt_lookup_num_tokens=3)
        return
    with case.attach():
        greedy = generate(model, inputs, 10)
        assisted = generate(model, inputs, 10, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy.sequences, assisted.sequences)
    for a, b in zip(greedy.logits, assisted.logits, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("attached", ["assistant", "model", "both"])
@pytest.mark.parametrize("family", ["llava", "llava_gqa", "qwen2_5_vl"])
def test_a_model_with_an_assistant(family: str, attached: str) -> None:
    """Whichever of the two is reduced: the answer is that of the model. An assistant is given no pictures, and so
    reduces none."""
    model, assistant, inputs = build(family), build(family), FAMILIES[family].inputs([ONE])
    with contextlib.ExitStack() as stack:
        if attached != "assistant":
            stack.enter_context(duet_vlm.attach(model, "duet", budget=0.4))
        if attached != "model":
            stack.enter_context(duet_vlm.attach(assistant, "duet", budget=0.3))
        alone, assisted = generate(model, inputs, 8), generate(model, inputs, 8, assistant_model=assistant)
    assert torch.equal(alone.sequences, assisted.sequences)


@pytest.mark.parametrize("family", FIRST)
def test_a_static_cache_for_text(family: str) -> None:
    model, inputs = build(family), FAMILIES[family].inputs([TEXT])
    plain = generate(model, inputs, 4, cache_implementation="static").logits
    with duet_vlm.attach(model, "duet", budget=0.4):
        found = generate(model, inputs, 4, cache_implementation="static").logits
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("family", FIRST)
def test_rejected_drafts_of_a_padded_prompt_leave_no_gap(family: str) -> None:
    """The first pass carries draft tokens; those that are rejected are cut off the cache, padding stays masked."""
    row = (*ONE, 50, 51, 52, 50, 51)
    inputs = FAMILIES[family].inputs([row])
    ids = torch.cat([torch.zeros(1, 3).long(), inputs["input_ids"]], 1)
    padded = inputs | {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if FAMILIES[family].mrope:
        padded["mm_token_type_ids"] = (ids == 99).long()
    with Case(family, "sdpa", "duet", "keep").attach():
        greedy = generate(shared(family), padded, 8)
        assisted = generate(shared(family), padded, 8, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy.sequences, assisted.sequences)
    for a, b in zip(greedy.logits, assisted.logits, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@matrix("duet", "fastv", attention=("sdpa", "eager"))
def test_a_cache_cropped_into_its_prompt_goes_on(case: Case) -> None:
    """All drafts of the first pass rejected, one token next: fewer keys than the first pass had, with padding in front."""
    made, model = FAMILIES[case.family], case.model()
    pad = torch.zeros(1, 3).long()
    results = []
    if not made.drafts:
        stock_model_takes_no_drafts(case)
        return
    with case.attach() as handle:
        for drafts in ((), (61, 62, 63)):
            inputs = made.inputs([(*ONE, *drafts)])
            ids = torch.cat([pad, inputs["input_ids"]], 1)
            inputs |= {"input_ids": ids, "attention_mask": (ids != 0).long()}
            if made.mrope:
                inputs["mm_token_type_ids"] = (ids == 99).long()
            cache = forward(model, inputs, use_cache=True, logits_to_keep=1 + len(drafts)).past_key_values
            cache.crop(-len(drafts))
            mask = torch.cat([inputs["attention_mask"][:, : ids.shape[1] - len(drafts)], torch.ones(1, 1).long()], 1)
            step = {"input_ids": torch.tensor([[33]]), "attention_mask": mask}
            if made.mrope:
                step["position_ids"] = torch.full((3, 1, 1), 40)  # of the caller; the reduced cache knows its own
            results.append(
                (forward(model, step, past_key_values=cache).logits, [span.stages for span in handle.trace[0]])
            )
    (plain, stages), (cropped, same) = results
    assert same == stages
    torch.testing.assert_close(cropped, plain, **CLOSE)


class Collector(BaseStreamer):
    """Keeps what is streamed; ``end`` tells a waiting thread."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.done = threading.Event()

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.done.set()


@matrix("duet", "fastv", attention=("sdpa",))
def test_streaming_from_a_thread(case: Case) -> None:
    inputs, model, streamer = FAMILIES[case.family].inputs([ONE]), case.model(), Collector()
    with case.attach():
        expected = generate(model, inputs, 6).sequences
        thread = threading.Thread(target=generate, args=(model, inputs, 6), kwargs={"streamer": streamer})
        thread.start()
        thread.join(60)
    assert streamer.done.is_set() and streamer.tokens == expected.flatten().tolist()


@pytest.mark.parametrize("family", FIRST)
def test_two_handles_in_two_threads(family: str) -> None:
    """Each thread runs its own model and method many times; neither sees the other's calls."""
    made = FAMILIES[family]
    jobs = [("duet", {"budget": 0.3}, made.inputs(MIXED)), ("fastv", {}, made.inputs([TWO, ONE]))]
    models = [build(family), build(family)]
    handles = [
        duet_vlm.attach(model, method, **settings) for model, (method, settings, _) in zip(models, jobs, strict=True)
    ]
    expected = [generate(model, inputs, 3) for model, (_, _, inputs) in zip(models, jobs, strict=True)]
    traces = [handle.trace for handle in handles]
    results: list[list[Any]] = [[], []]

    def work(number: int) -> None:
        for _ in range(4):
            results[number].append(generate(models[number], jobs[number][2], 3))

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for number in (0, 1):
        assert len(results[number]) == 4
        for result in results[number]:
            assert all(torch.equal(a, b) for a, b in zip(result.logits, expected[number].logits, strict=True))
        assert handles[number].trace == traces[number]
        handles[number].detach()


@pytest.mark.parametrize("family", FIRST)
def test_one_model_in_two_threads(family: str) -> None:
    """Calls of one attached model from several threads do not meet either."""
    made, model = FAMILIES[family], build(family)
    batches = [made.inputs(MIXED), made.inputs([TWO])]
    results: list[list[Any]] = [[], []]
    with duet_vlm.attach(model, "duet", budget=0.3):
        expected = [generate(model, inputs, 3) for inputs in batches]

        def work(number: int) -> None:
            for _ in range(4):
                results[number].append(generate(model, batches[number], 3))

        threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for number in (0, 1):
        assert len(results[number]) == 4
        assert all(
            torch.equal(a, b)
            for result in results[number]
            for a, b in zip(result.logits, expected[number].logits, strict=True)
        )


@matrix("duet", "fastv", attention=("sdpa",))
def test_embeddings_with_pixels(case: Case) -> None:
    """inputs_embeds are fine as long as the images come along: placeholders are then told by their embedding."""
    inputs, model = FAMILIES[case.family].inputs([ONE, TWO]), case.model()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    instead = {k: v for k, v in inputs.items() if k != "input_ids"} | {"inputs_embeds": embeds}
    if FAMILIES[case.family].mrope:  # Qwen's own position code wants ids
        positions, _ = model.model.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
        instead["position_ids"] = positions
    with case.attach() as handle:
        expected, trace = forward(model, inputs).logits, handle.trace
        found = forward(model, instead).logits
        assert handle.trace == trace
    torch.testing.assert_close(found, expected, **CLOSE)
