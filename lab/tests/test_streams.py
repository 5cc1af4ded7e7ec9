"""Sealed streams: made of a commit's hash, each opened once; every listed one is that of the result beside it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from duet_vlm_lab.streams import StreamError, opened, seed_of

LIST = Path(__file__).parents[1] / "comparison" / "streams.json"


def test_listed_streams_are_those_of_their_results() -> None:
    listed = json.loads(LIST.read_text())
    assert listed
    for stream in listed:
        result = json.loads((LIST.parent / stream["result"]).read_text())
        assert result["experiment"]["seeds"] == [stream["seed"]] == [int(stream["commit"][:6], 16)]
        assert stream["commit"].startswith(result["environment"]["commit"])
    assert len({(stream["result"].partition("/")[0], stream["seed"]) for stream in listed}) == len(listed)


def test_a_stream_belongs_to_a_commit_and_is_opened_once(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", tmp_path, *words], check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip()

    def commit(text: str) -> str:
        (tmp_path / "src" / "method.py").write_text(text)
        git("add", "src")
        git("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", text)
        return git("rev-parse", "HEAD")

    git("init", "-q")
    (tmp_path / "src").mkdir()
    (tmp_path / "lab").mkdir()
    streams = tmp_path / "lab" / "streams.json"
    first = commit("one")
    assert opened(streams, "tiny/results/a.json") == seed_of(first) == int(first[:6], 16)
    assert opened(streams, "tiny/results/a.json") == seed_of(first)  # a run that was broken off
    assert opened(streams, "tiny-page/results/a.json") == seed_of(first)
    with pytest.raises(StreamError, match=f"tiny/results/a.json has opened the stream of {first[:8]} for tiny"):
        opened(streams, "tiny/results/b.json")
    (tmp_path / "src" / "method.py").write_text("two")
    with pytest.raises(StreamError, match=r"commit first.*src/method.py"):
        opened(streams, "tiny/results/b.json")
    second = commit("two")
    assert opened(streams, "tiny/results/b.json") == seed_of(second)
    assert opened(streams, "tiny/results/a.json") == seed_of(first)  # still
    assert [stream["commit"] for stream in json.loads(streams.read_text())] == [first, first, second]
