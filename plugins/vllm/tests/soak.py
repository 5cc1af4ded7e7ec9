"""Thirty-two clients at a server whose decoder drops rows: streams of answers to prompts with pictures, some of them
given up. Nothing may be lost.

    python plugins/vllm/tests/soak.py 300       # seconds; then the server is killed, started again and asked again
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openai
from serving import BOTH, KEY, PICTURES, free_port, metric, server

CLIENTS, NEW, GIVEN_UP = 32, 24, 0.2
QUESTIONS = [
    (tuple((first + i) % len(PICTURES) for i in range(count)), text)
    for count in range(4)
    for first, text in enumerate(("what is at place 3?", "how many?", "what is left of it, and why do you think so?"))
]
STILL = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


@dataclass
class Soak:
    """What came of it: requests that were answered, those whose client went away, and answers that were other than one
    by one."""

    answered: int = 0
    given_up: int = 0
    differ: int = 0


Answer = tuple[str, list[float]]  # what is written, and the log probability of each token


async def stream(client: Any, question: tuple[tuple[int, ...], str], pieces: int | None = None) -> Answer | None:
    """The answer; None where the client goes away after some ``pieces`` of it."""
    shown, text = question
    content = [*({"type": "image_url", "image_url": {"url": PICTURES[number]}} for number in shown)]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    coming = await client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=NEW,
        temperature=0,
        stream=True,
        logprobs=True,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )
    written: list[str] = []
    chances: list[float] = []
    async with coming:
        async for number, piece in _numbered(coming):
            if number == pieces:
                return None
            for choice in piece.choices:
                written.append(choice.delta.content or "")
                chances += [token.logprob for token in choice.logprobs.content] if choice.logprobs else []
    return "".join(written), chances


def same(ours: Answer | None, theirs: Answer | None) -> bool:
    """Up to what another batch changes in float32."""
    if ours is None or theirs is None or ours[0] != theirs[0] or len(ours[1]) != len(theirs[1]):
        return False
    return all(abs(a - b) < 1e-3 for a, b in zip(ours[1], theirs[1], strict=True))


async def _numbered(coming: Any) -> Any:
    number = 0
    async for piece in coming:
        yield number, piece
        number += 1


def client_of(port: int) -> Any:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=300)


async def one_by_one(port: int) -> list[Answer | None]:
    async with client_of(port) as client:
        return [await stream(client, question) for question in QUESTIONS]


async def soak(port: int, seconds: float, expected: list[Answer | None], seed: int = 0) -> Soak:
    """Keep all clients busy for some seconds."""
    found, end = Soak(), time.monotonic() + seconds

    async def busy(client: Any, draw: random.Random) -> None:
        while time.monotonic() < end:
            number = draw.randrange(len(QUESTIONS))
            pieces = draw.randrange(NEW // 2) if draw.random() < GIVEN_UP else None
            answer = await stream(client, QUESTIONS[number], pieces)
            found.answered += answer is not None
            found.given_up += answer is None
            found.differ += answer is not None and not same(answer, expected[number])

    async with client_of(port) as client:
        await asyncio.gather(*(busy(client, random.Random(CLIENTS * seed + number)) for number in range(CLIENTS)))
    return found


def left_behind(port: int, patience: float = 20) -> dict[str, float]:
    """Requests that run or wait, and the share of the cache in use, when all clients have gone: empty if none."""
    end = time.monotonic() + patience
    while (left := {name: value for name in STILL if (value := metric(port, name))}) and time.monotonic() < end:
        time.sleep(0.2)
    return left


def soaked(seconds: float) -> dict[str, Any]:
    """What a server answered, whether anything was left behind, and whether it answers the same after a SIGKILL."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        with server(port, Path(folder) / "log", reduction=BOTH) as process:
            expected = asyncio.run(one_by_one(port))
            made = asdict(asyncio.run(soak(port, seconds, expected))) | {"left_behind": left_behind(port)}
            made["preemptions"] = metric(port, "vllm:num_preemptions_total")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
        with server(port, Path(folder) / "again", reduction=BOTH):
            made["same_after_kill"] = all(map(same, asyncio.run(one_by_one(port)), expected))
    return {"seconds": seconds, "clients": CLIENTS} | made


def main() -> None:
    made = soaked(float(sys.argv[1]))
    print(json.dumps(made))
    sys.exit(bool(made["differ"] or made["left_behind"] or not made["same_after_kill"]))


if __name__ == "__main__":
    main()
