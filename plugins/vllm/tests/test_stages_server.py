"""A real server whose decoder drops rows, started by the command line: many at once, errors by name, and nothing lost."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_server import ENGINE, KEY, PICTURES, QUIET, ask, command, free_port, metric, openai

STARTED = "rows leave before decoder layers 6, 9 of 12; 4 KV-cache groups of 3 layers"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    run = command(
        "--method",
        "duet",
        "--budget",
        "16",
        "--stages",
        "all",
        "--port",
        str(port),
        "--api-key",
        KEY,
        "--",
        *ENGINE,
    )
    run.remove("duet_plus")
    run.remove("--method")
    with log.open("wb") as file:
        process = subprocess.Popen(
            run,
            env=os.environ | QUIET | {"VLLM_LOGGING_LEVEL": "INFO"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                    break
                except OSError:
                    time.sleep(1)
            yield port, log
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def answer(port: int, number: int) -> tuple[str, int]:
    """Of request ``number``: none, one or two pictures in turns."""
    shown = tuple(PICTURES[(number + i) % 4] for i in range(number % 3))
    found = ask(port, shown, text=f"what is at place {number % 5}?")
    return found.choices[0].message.content, found.usage.prompt_tokens


def test_thirty_two_at_once_answer_as_one_after_the_other(place: tuple[int, Path]) -> None:
    port, log = place
    alone = [answer(port, number) for number in range(12)]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda number: answer(port, number % 12), range(96)))
    assert together == alone * 8
    told = log.read_text()
    assert STARTED in told and "prompts of 64 rows of text and an image of 512 visual tokens, and would hold" in told


def test_what_cannot_be_served_is_a_400_and_the_server_goes_on(place: tuple[int, Path]) -> None:
    port, _ = place
    before = answer(port, 1)
    with pytest.raises(
        openai.BadRequestError, match="prompt_logprobs: visual tokens that leave inside the decoder have none"
    ):
        ask(port, extra={"prompt_logprobs": 1})
    assert answer(port, 1) == before


def test_rows_that_leave_are_counted(place: tuple[int, Path]) -> None:
    """Of 256 rows of a picture 25 enter; 12 go on into layers 6 to 8, and none into layers 9 to 11."""
    port, _ = place
    names = (
        'duet_vlm_rows_dropped_total{layer="6"',
        'duet_vlm_rows_dropped_total{layer="9"',
        "duet_vlm_kv_rows_saved_total",
    )
    before = [metric(port, name) for name in names]
    ask(port, shown=(PICTURES[2],))
    ask(port, shown=(PICTURES[2], PICTURES[3]))
    ask(port, shown=())
    assert [metric(port, name) - old for name, old in zip(names, before, strict=True)] == [
        3 * 13,
        3 * 12,
        3 * (3 * 13 + 3 * 25),
    ]


def test_streams(place: tuple[int, Path]) -> None:
    port, _ = place
    pieces = list(ask(port, stream=True))
    whole = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert whole == ask(port).choices[0].message.content


def test_all_blocks_are_free_at_the_end(place: tuple[int, Path]) -> None:
    """Requests that wait and run and the cache in use, as the server counts them."""
    port, _ = place
    told = ""
    for _ in range(50):
        told = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        values = {
            line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in told.splitlines() if line.startswith("vllm:")
        }
        if not values["vllm:num_requests_running"] and not values["vllm:kv_cache_usage_perc"]:
            return
        time.sleep(0.2)
    pytest.fail(told)
