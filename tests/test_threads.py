"""Several threads on one attached model: a pause belongs to who asked for it, a call runs to its end by the rules it
began with."""

from __future__ import annotations

import asyncio
import contextvars
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXED, ONE, TEXT, build, forward, generate
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import duet_vlm

SECONDS = float(os.environ.get("DUET_VLM_STRESS_SECONDS", "4"))  # of the stress test; 60 for a long look


class Meet(LogitsProcessor):
    """Calls ``then`` once, after the first step of a generation."""

    def __init__(self, then: Callable[[], Any]) -> None:
        self.then: Callable[[], Any] | None = then

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        then, self.then = self.then, None
        if then is not None:
            then()
        return scores


def in_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # shown where the test reads it
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert found, "the thread did not end"
    return found[0]


@pytest.mark.parametrize("method", ["duet", "fastv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pause_stays_in_its_thread(family: str, method: str) -> None:
    model, inputs = build(family), FAMILIES[family].inputs(MIXED)
    plain = forward(model, inputs).logits
    with duet_vlm.attach(model, method, budget=0.4) as handle:
        reduced = forward(model, inputs).logits
        with handle.paused():
            assert torch.equal(forward(model, inputs).logits, plain)
            assert torch.equal(in_thread(lambda: forward(model, inputs).logits), reduced)
            taken_along = contextvars.copy_context()
            assert torch.equal(in_thread(lambda: taken_along.run(lambda: forward(model, inputs).logits)), plain)
        assert torch.equal(forward(model, inputs).logits, reduced)
    assert not torch.equal(reduced[:, -1], plain[:, -1])


def test_a_pause_stays_in_its_task() -> None:
    model, inputs = build("llava"), FAMILIES["llava"].inputs([ONE])
    plain = forward(model, inputs).logits

    async def ask(handle: duet_vlm.Handle, pause: bool) -> Tensor:
        if not pause:
            await asyncio.sleep(0.01)
            return forward(model, inputs).logits
        with handle.paused():
            await asyncio.sleep(0.02)
            return forward(model, inputs).logits

    async def both(handle: duet_vlm.Handle) -> list[Tensor]:
        return await asyncio.gather(ask(handle, True), ask(handle, False))

    with duet_vlm.attach(model, "duet", budget=0.4) as handle:
        reduced = forward(model, inputs).logits
        paused, other = asyncio.run(both(handle))
    assert torch.equal(paused, plain) and torch.equal(other, reduced)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_generation_ends_by_the_rules_it_began_with(family: str, use_cache: bool) -> None:
    """Another budget, another thread's pause and its detach, between two steps."""
    model, inputs = build(family), FAMILIES[family].inputs([ONE, TEXT])
    plain = generate(model, inputs, 5).logits
    handle = duet_vlm.attach(model, "duet", budget=0.4)
    expected = generate(model, inputs, 5, use_cache=use_cache).logits
    waiting: list[threading.Thread] = []

    def detach() -> None:
        waiting.append(threading.Thread(target=handle.detach))
        waiting[0].start()
        time.sleep(0.05)  # it must wait for the generation, so there is nothing to wait for here

    for between in (lambda: handle.set(budget=0.2), detach):
        meet = LogitsProcessorList([Meet(between)])
        found = generate(model, inputs, 5, use_cache=use_cache, logits_processor=meet).logits
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        expected = (
            expected
            if handle.budget == 0.4
            else generate(model, inputs, 5, use_cache=use_cache).logits
            if not waiting
            else expected
        )
    waiting[0].join(60)
    assert duet_vlm.handle_of(model) is None
    assert all(torch.equal(a, b) for a, b in zip(generate(model, inputs, 5).logits, plain, strict=True))


def test_detach_inside_a_generation_of_its_own_thread() -> None:
    model, inputs = build("llava"), FAMILIES["llava"].inputs([ONE])
    plain = generate(model, inputs, 5).logits
    handle = duet_vlm.attach(model, "duet", budget=0.4)
    expected = generate(model, inputs, 5).logits
    found = generate(model, inputs, 5, logits_processor=LogitsProcessorList([Meet(handle.detach)])).logits
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert duet_vlm.handle_of(model) is None and not handle.installed
    assert all(torch.equal(a, b) for a, b in zip(generate(model, inputs, 5).logits, plain, strict=True))


def test_a_full_answer_inside_a_reduced_generation() -> None:
    """Contrastive decoding: a logits processor asks the full model in between."""
    model, inputs = build("llava"), FAMILIES["llava"].inputs([ONE])
    plain = forward(model, inputs).logits
    seen: list[Tensor] = []
    with duet_vlm.attach(model, "duet", budget=0.4) as handle:

        def ask() -> None:
            with handle.paused():
                seen.append(forward(model, inputs).logits)

        expected = generate(model, inputs, 5).logits
        found = generate(model, inputs, 5, logits_processor=LogitsProcessorList([Meet(ask)])).logits
    assert torch.equal(seen[0], plain)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_reports_belong_to_the_thread_that_asks() -> None:
    model, made = build("llava"), FAMILIES["llava"]
    with duet_vlm.attach(model, "duet", budget=0.4) as handle:
        forward(model, made.inputs([ONE]))
        assert handle.report().batch == 1

        def other() -> int:
            assert handle.report().batch == 1  # made none itself: the last of all
            forward(model, made.inputs(MIXED))
            return handle.report().batch

        assert in_thread(other) == 3
        assert handle.report().batch == 1 and len(handle.trace) == 1
        handle.set(budget=0.8)
        assert handle.report().budget == 0.4  # what ran, not what comes


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_four_threads(family: str) -> None:
    """Pauses, budgets and a detach at random: every answer is that of the full model or of one of the budgets, bit for
    bit."""
    model, made = build(family), FAMILIES[family]
    batches = [made.inputs([ONE]), made.inputs([ONE, TEXT])]
    budgets = (0.2, 0.4, 0.8)

    def answers() -> list[Tensor]:
        return [torch.stack(generate(model, inputs, 3).logits) for inputs in batches]

    full, expected = answers(), []
    for budget in budgets:
        with duet_vlm.attach(model, "duet", budget=budget):
            expected.append(answers())
    stop = time.monotonic() + SECONDS
    wrong: list[str] = []
    asked = [0]
    while time.monotonic() < stop:
        handle = duet_vlm.attach(model, "duet", budget=budgets[0])
        over = threading.Event()

        def work(seed: int, handle: duet_vlm.Handle = handle, over: threading.Event = over) -> None:
            draw = random.Random(seed)
            while not over.is_set():
                number, pause = draw.randrange(2), draw.random() < 0.3
                try:
                    if draw.random() < 0.3:
                        handle.set(budget=draw.choice(budgets))
                    if pause:
                        with handle.paused():
                            logits = torch.stack(generate(model, batches[number], 3).logits)
                    else:
                        logits = torch.stack(generate(model, batches[number], 3).logits)
                except RuntimeError as error:
                    if "this handle is detached" in str(error):
                        continue
                    wrong.append(repr(error))
                    return
                except Exception as error:
                    wrong.append(repr(error))
                    return
                asked[0] += 1
                may_be = [full[number]] if pause else [full[number], *(some[number] for some in expected)]
                if not any(torch.equal(logits, one) for one in may_be):
                    wrong.append(f"an answer that no setting gives (paused: {pause})")

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(random.Random(int(stop)).uniform(0.5, 1.5))
        handle.detach()
        over.set()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    assert not wrong and asked[0] > 10
    assert all(torch.equal(a, b) for a, b in zip(answers(), full, strict=True))


def test_an_interrupt_leaves_no_call_behind() -> None:
    """Ctrl-C inside a layer: features and the base model's next prompt are none of the interrupted one's."""
    model, made = build("llava"), FAMILIES["llava"]
    first, second = made.inputs(MIXED), made.inputs([ONE])
    plain = model.model.get_image_features(second["pixel_values"]).pooler_output
    with duet_vlm.attach(model, "duet", budget=0.4) as handle:
        expected = model.model(**second).last_hidden_state

        def interrupt(*args: Any) -> None:
            raise KeyboardInterrupt

        hook = model.model.language_model.layers[3].register_forward_pre_hook(interrupt)
        for call in (lambda: forward(model, first), lambda: generate(model, first, 2), lambda: model.model(**first)):
            with pytest.raises(KeyboardInterrupt):
                call()
        hook.remove()
        assert all(
            torch.equal(a, b)
            for a, b in zip(model.model.get_image_features(second["pixel_values"]).pooler_output, plain, strict=True)
        )
        assert torch.equal(model.model(**second).last_hidden_state, expected)
        assert torch.equal(in_thread(lambda: model.model(**second).last_hidden_state), expected)
        started = time.monotonic()
        handle.detach()
        assert time.monotonic() - started < 5
