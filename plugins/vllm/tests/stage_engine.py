"""One vLLM engine whose decoder drops rows, and the ways in which requests are put to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import engine
from stage_cases import NEW
from vllm import LLM, SamplingParams

from duet_vlm.serve.served_method import REQUEST_CHECKS, SCHEDULER, WORKER

NEEDED: dict[str, Any] = {
    "worker_cls": WORKER, "scheduler_cls": SCHEDULER, "logits_processors": [REQUEST_CHECKS], "enable_chunked_prefill": False,
    "max_num_batched_tokens": 4096,
}  # fmt: skip


def start(folder: Path | str, family: str, settings: dict[str, Any], **more: Any) -> LLM:
    return engine.start(folder, family, settings | {"stages": "all"}, **NEEDED | more)


def core(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core


def greedy(new: int = NEW) -> SamplingParams:
    return SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, logprobs=1)


def ask(llm: LLM, requests: Sequence[Any], new: int = NEW) -> list[list[Any]]:
    """Tokens and log probabilities of requests that come at once."""
    return [engine.found(output)[1:] for output in llm.generate(list(requests), greedy(new), use_tqdm=False)]


def arrive(
    llm: LLM, arrivals: Sequence[tuple[int, str, Any]], new: int = NEW, aborted: Mapping[str, int] | None = None
) -> tuple[dict[str, list[Any]], list[dict[str, int]]]:
    """Requests that come at the numbers of steps; answers, and how many tokens of whom each step read. ``aborted``:
    steps at which those who asked go away."""
    running, scheduler, waiting = llm.llm_engine, core(llm).scheduler, sorted(arrivals, key=lambda one: one[0])
    done: dict[str, list[Any]] = {}
    steps: list[dict[str, int]] = []
    stock = scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        out = stock(*args, **kwargs)
        steps.append({name.rsplit("-", 1)[0]: count for name, count in out.num_scheduled_tokens.items()})
        return out

    scheduler.schedule = schedule
    try:
        number = 0
        while waiting or running.has_unfinished_requests():
            while waiting and waiting[0][0] <= number:
                _, name, request = waiting.pop(0)
                running.add_request(name, request, greedy(new))
            running.abort_request([name for name, when in (aborted or {}).items() if when == number])
            for output in running.step():
                if output.finished:
                    done[output.request_id] = engine.found(output)[1:]
            number += 1
    finally:
        scheduler.schedule = stock
    return done, steps


def preempted(llm: LLM, request: Any, after: int, new: int = NEW) -> list[Any]:
    """The answer to a request that is preempted once, with ``after`` tokens written: it is read again from its first
    token on."""
    running, written = llm.llm_engine, 0
    running.add_request("preempted", request, greedy(new))
    while running.has_unfinished_requests():
        (output,) = running.step()
        written += 1
        if written == after:
            assert running.reset_prefix_cache(reset_running_requests=True)
    return engine.found(output)[1:]


def same(ours: list[Any], theirs: list[Any], within: float = 2e-4) -> bool:
    count = len(ours[0])
    return ours[0] == theirs[0][:count] and all(abs(a - b) < within for a, b in zip(ours[1], theirs[1], strict=False))
