"""A real server whose decoder drops rows, started by the command line: many at once, errors by name, and nothing lost."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from cases import blobs
from serving import BOTH, PICTURES, ask, client, free_port, metric, server, url
from soak import NEW, left_behind, one_by_one, same, soak

STARTED = "rows leave before decoder layers 6, 9 of 12; 4 KV-cache groups of 3 layers"
SOAK = float(os.environ.get("DUET_VLM_SOAK", "30"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path, subprocess.Popen[bytes]]]:
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    with server(port, log, reduction=BOTH, level="INFO") as process:
        yield port, log, process


def answer(port: int, number: int) -> tuple[str, int]:
    """Of request ``number``: none, one or two pictures in turns."""
    shown = tuple(PICTURES[(number + i) % 4] for i in range(number % 3))
    found = ask(port, shown, text=f"what is at place {number % 5}?")
    return found.choices[0].message.content, found.usage.prompt_tokens


def test_thirty_two_at_once_answer_as_one_after_the_other(place: tuple[int, Path, object]) -> None:
    port, log, _ = place
    alone = [answer(port, number) for number in range(12)]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda number: answer(port, number % 12), range(96)))
    assert together == alone * 8
    told = log.read_text()
    assert STARTED in told and "prompts of 64 rows of text and an image of 512 visual tokens, and would hold" in told


def test_what_cannot_be_served_is_a_400_and_the_server_goes_on(place: tuple[int, Path, object]) -> None:
    port, *_ = place
    completions, words = client(port).completions, {"model": "tiny", "prompt": "what is it?", "max_tokens": 2}
    unseen = [{"type": "image_embeds", "image_embeds": "AAAA"}, {"type": "text", "text": "what?"}]
    chats = client(port).chat.completions
    # what is asked, of a picture that nobody has seen before
    refused: list[tuple[str, Callable[[tuple[str]], Any]]] = [
        ("prompt_logprobs: visual tokens that leave", lambda new: ask(port, new, extra={"prompt_logprobs": 1})),
        ("prompt_logprobs: visual tokens", lambda new: completions.create(**words, echo=True, logprobs=1)),
        ("beam search: each step", lambda new: ask(port, new, extra={"use_beam_search": True}, n=2)),
        ("the prompt ends in an image", lambda new: ask(port, new, "", extra={"add_generation_prompt": False})),
        ("trust-request-mm-kwargs", lambda new: ask(port, new, extra={"mm_processor_kwargs": {"duet_budget": 4}})),
        (
            "enable-prompt-embeds",
            lambda new: completions.create(**words | {"prompt": None}, extra_body={"prompt_embeds": "AAAA"}),
        ),
        (
            "enable-mm-embeds",
            lambda new: chats.create(model="tiny", messages=[{"role": "user", "content": unseen}]),
        ),
    ]
    before = answer(port, 1)
    for number, (says, one) in enumerate(refused):
        new = (url(blobs(100 + number, 224, 224)),)
        with pytest.raises(openai.BadRequestError, match=says):
            one(new)
        assert ask(port, new).choices[0].message.content is not None
        assert answer(port, 1) == before
    with pytest.raises(openai.NotFoundError, match="a-lora"):
        ask(port, model="a-lora")
    assert answer(port, 1) == before


def test_rows_that_leave_are_counted(place: tuple[int, Path, object]) -> None:
    """Of 256 rows of a picture 25 enter; 12 go on into layers 6 to 8, and none into layers 9 to 11."""
    port, *_ = place
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


def test_streams(place: tuple[int, Path, object]) -> None:
    port, *_ = place
    pieces = list(ask(port, stream=True))
    whole = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert whole == ask(port).choices[0].message.content


def test_thirty_two_clients_some_of_which_go_away(place: tuple[int, Path, object]) -> None:
    """Nothing is lost and all blocks are free at the end. ``DUET_VLM_SOAK``: for how many seconds; ``soak.py`` is the
    same by itself."""
    port, *_ = place
    expected = asyncio.run(one_by_one(port))
    assert all(len(one[1]) == NEW for one in expected) and not same(expected[0], expected[1])
    found = asyncio.run(soak(port, SOAK, expected))
    print(found)
    assert found.answered > SOAK and found.given_up and not found.differ
    assert not left_behind(port)


def test_a_server_that_was_killed_starts_again_with_the_same_answers(
    place: tuple[int, Path, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """The last test of this file: it ends the server that the others ask."""
    port, _, process = place
    before = [answer(port, number) for number in range(4)]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    with server(port, tmp_path / "log", reduction=BOTH):
        assert [answer(port, number) for number in range(4)] == before
