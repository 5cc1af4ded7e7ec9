"""A real server, started by the command line, asked by OpenAI's client: what comes back, what is refused, and that
nothing is lost.

``DUET_VLM_SOAK=300`` keeps 32 requests in flight for that many seconds.
"""

from __future__ import annotations

import base64
import concurrent.futures
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from cases import CLIPS, REFUSES, blobs
from serving import KEY, PICTURES, QUIET, ask, client, clip_url, command, free_port, metric, rows, server, url

SOAK = float(os.environ.get("DUET_VLM_SOAK", "5"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    with server(port, log):
        yield port, log


def test_prompts_hold_what_enters(place: tuple[int, Path]) -> None:
    port, log = place
    assert (
        "method=duet_plus, budget=16" in log.read_text()
        and f"http://127.0.0.1:{port}/v1" in log.read_text()
        and KEY not in log.read_text()
    )
    none, one = rows(port, shown=()), rows(port)
    assert 0 <= one - none - 16 <= 2
    marks = one - none - 16
    assert rows(port, shown=(PICTURES[0], PICTURES[1])) == none + 2 * (16 + marks)
    assert rows(port, extra={"mm_processor_kwargs": {"duet_budget": 4}}) == one - 12
    chunks = list(ask(port, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.prompt_tokens == one
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        == ask(port).choices[0].message.content
    )


def test_counters_stand_on_the_page_of_vllm(place: tuple[int, Path]) -> None:
    port, _ = place
    names = (
        "duet_vlm_visual_tokens_before_total",
        "duet_vlm_visual_tokens_after_total",
        "duet_vlm_reduced_requests_total",
    )
    before = [metric(port, name) for name in names]
    ask(port, shown=(PICTURES[2],))
    ask(port, shown=(PICTURES[2], PICTURES[3]), extra={"mm_processor_kwargs": {"duet_budget": 4}})
    ask(port, shown=())
    assert [metric(port, name) - old for name, old in zip(names, before, strict=True)] == [3 * 256, 16 + 2 * 4, 2]


def refused(port: int, **more: Any) -> tuple[int, str]:
    with pytest.raises(openai.APIStatusError) as error:
        ask(port, **more)
    return error.value.status_code, str(error.value)


def test_what_cannot_be_is_said_and_the_server_goes_on(place: tuple[int, Path]) -> None:
    port, _ = place
    one = rows(port)
    for asked, says in ((400, "allows 16 at most"), (0, "at least 1"), ("x", "duet_budget='x'")):
        code, message = refused(port, extra={"mm_processor_kwargs": {"duet_budget": asked}})
        assert code == 400 and says in message
    broken = "data:image/png;base64," + base64.b64encode(b"no picture").decode()
    huge, bomb = (
        "data:image/png;base64," + base64.b64encode(_header(side, side)).decode() for side in (11_000, 60_000)
    )
    for picture in (broken, huge, "http://127.0.0.1:1/x.png"):
        code, message = refused(port, shown=(picture,))
        assert 400 <= code < 500 and message, picture[:40]
    # vLLM answers these as faults of its own
    for picture, says in ((bomb, "pixels"), ("file:///etc/hostname", "local")):
        assert says in refused(port, shown=(picture,))[1]
    with pytest.raises(openai.AuthenticationError):
        client(port, "another-key").models.list()
    assert rows(port) == one


@pytest.mark.parametrize("family", ["llava_onevision", "internvl"])
def test_families_whose_images_are_cut_up_are_served_alike(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """A square of one crop or tile: what enters, a budget of its own, what is refused, and that the server goes on. A
    clip, or why there is none."""
    port, model, picture = free_port(), str(checkpoints[family]), url(blobs(0, 112, 112))
    clip: Any = {"model": model, "shown": (clip_url([blobs(seed, 56, 56) for seed in range(8)]),), "kind": "video_url"}
    with server(port, tmp_path / "log", model):
        none, one = (rows(port, model=model, shown=shown) for shown in ((), (picture,)))
        assert 16 <= one - none <= 19  # and the marks around it
        assert rows(port, model=model, shown=(picture,), extra={"mm_processor_kwargs": {"duet_budget": 4}}) == one - 12
        for asked, says in ((400, "allows 16 at most"), (0, "at least 1"), ("x", "duet_budget='x'")):
            code, message = refused(
                port, model=model, shown=(picture,), extra={"mm_processor_kwargs": {"duet_budget": asked}}
            )
            assert code == 400 and says in message
        if family in CLIPS:
            assert 16 <= rows(port, **clip) - none <= 19
            assert rows(port, **clip, extra={"mm_processor_kwargs": {"duet_budget": 4}}) == rows(port, **clip) - 12
        else:
            code, message = refused(port, **clip)
            assert code == 400 and REFUSES[family] in message
        assert rows(port, model=model, shown=(picture,)) == one


def _header(width: int, height: int) -> bytes:
    """A PNG that says it is as large as that, and holds one line."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def test_many_at_once_and_nothing_lost(place: tuple[int, Path]) -> None:
    """32 in flight: other pictures, other budgets, none; each gets its own count and its own answer, the same every
    time."""
    port, _ = place
    asked: list[dict[str, Any]] = [
        {
            "shown": tuple(PICTURES[i % 4] for i in range(n)),
            "text": text,
            "extra": {"mm_processor_kwargs": {"duet_budget": k}} if k else {},
        }
        for n in (0, 1, 2, 3)
        for k in (0, 4)
        for text in ("what is left of it?", "how many?")
    ]
    alone = [ask(port, **one) for one in asked]
    expected = [(one.usage.prompt_tokens, one.choices[0].message.content) for one in alone]
    end, number = time.monotonic() + SOAK, 0
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        while time.monotonic() < end:
            answers = list(pool.map(lambda i: ask(port, **asked[i % len(asked)]), range(64)))
            found = [(one.usage.prompt_tokens, one.choices[0].message.content) for one in answers]
            assert found == [expected[i % len(asked)] for i in range(64)]
            number += 64
    print(f"{number} requests")


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(place: tuple[int, Path]) -> None:
    began = time.monotonic()
    done = subprocess.run(
        command("--budget", "9", "--port", str(place[0])), capture_output=True, text=True, env=os.environ | QUIET
    )
    assert done.returncode == 2 and "choose another with --port" in done.stderr and len(done.stderr.splitlines()) == 1
    assert time.monotonic() - began < 60


def test_a_server_that_was_stopped_starts_again_with_the_same_answers(tmp_path: Path) -> None:
    port, found = free_port(), []
    for turn, how in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGTERM)):
        with server(port, tmp_path / f"log{turn}") as process:
            found.append(ask(port).choices[0].message.content)
            process.send_signal(how)
            process.wait(60)
    assert len(set(found)) == 1
