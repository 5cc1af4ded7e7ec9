"""Settings, counts and rows of a server, without any server. The engine itself is tested under plugins/vllm."""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import http.client
import http.server
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.main import get_command
from typer.testing import CliRunner

import duet_vlm
from duet_vlm.cli.main import app
from duet_vlm.cli.serve_transformers import NEEDED, Guard, remote
from duet_vlm.evaluation import tiny
from duet_vlm.runtime.encode.selection import part_sizes
from duet_vlm.serve.first_stage import reduce_rows
from duet_vlm.serve.served_method import ARCHITECTURES, NOTHING_ASKED, ServedMethod

# these read more of tower or prompt than the plug-in makes
BEYOND = {"cdpruner", "hired", "metok", "pool", "quecc", "resampler", "vqtoken", "vscan", "zoo_prune"}
FIRST_STAGES = sorted(
    name
    for name, cls in duet_vlm.list_methods().items()
    if issubclass(cls, duet_vlm.EncoderReducer) and not issubclass(cls, duet_vlm.TowerReducer) and name not in BEYOND
)


# ---- settings


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("duet", "give a dictionary"),
        ({"method": "duett", "budget": 9}, "did you mean 'duet'"),
        ({"method": "fastv", "budget": 9}, "fastv: it drops inside the decoder"),
        ({"method": "visionzip+pyramiddrop", "budget": 9}, "pyramiddrop: it drops inside"),
        ({"method": "contrast", "budget": 9}, "contrast: it works inside the vision tower"),
        ({"method": "none"}, "none: it reduces nothing"),
        ({"method": "duet_plus"}, "needs a budget"),
        ({"budget": 0}, "at least 1"),
        ({"budget": 1.5}, "a float is a fraction"),
        ({"budget": "64"}, "must be an int"),
        ({"method": "duet", "budget": 64, "dominant": 5}, "either budget= or the method's own"),
        ({"method": "visionzip", "domnant": 5}, "did you mean 'dominant'"),
        ({"method": "duet", "dominant": 5, "schedule": [[4, 0.5]]}, "schedule: a setting of what is dropped inside"),
        (
            {"method": "frames+duet_plus", "budget": 9, "duet_plus_schedule": [[4, 0.5]]},
            "duet_plus_schedule: a setting of what",
        ),
        ({"method": "duet_plus", "budget": 9, "options": {"text_query": "last"}}, "text_query: a setting of what"),
        ({"method": "duet_plus", "budget": 9, "options": {"positions": "keep"}}, "'compact' positions"),
        ({"method": "visionzip", "dominant": 9, "options": {"cls_token": True}}, "leave it out"),
        ({"method": "divprune", "keep": 0}, "leave none of an image's 1024"),
        ({"budget": 9, "signal_segments": False}, "signal_segments=False: it ranks all images of a call together"),
    ],
)
def test_settings_that_no_server_can_run_are_refused_by_name(given: Any, says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        ServedMethod.of(given, "compact")


@pytest.mark.parametrize("name", sorted(BEYOND & set(duet_vlm.list_methods())))
def test_a_method_that_reads_more_than_the_plug_in_makes_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: it reads .*choose another"):
        ServedMethod.of({"method": name, "budget": 64}, "compact")


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_every_method_with_a_first_stage_is_served_at_its_budget(name: str) -> None:
    served = ServedMethod.of({"method": name, "budget": 64}, "compact")
    for tokens in (1, 63, 64, 65, 576, 2880):
        assert served.span((tokens,)).entry == min(tokens, 64)
        assert served.span((tokens,), requested=served.asked({"duet_budget": 5})).entry == min(tokens, 5)
        assert served.span((tokens,), requested=served.asked({"duet_budget": 0.01})).entry == max(1, tokens // 100)
    assert served.span((576,) * 3, 48).entry == 64
    assert served.span((10,) * 3, 48).entry == 30  # newlines leave first


def test_a_request_may_ask_for_less_and_is_told_when_it_asks_for_more() -> None:
    served = ServedMethod.of({"method": "divprune", "budget": 64}, "compact")
    assert served.asked({}) == served.asked({"duet_budget": None}) == NOTHING_ASKED
    one, whole = served.asked({"duet_budget": 1}), served.asked({"duet_budget": 1.0})  # a token, and all tokens
    assert served.span((576,), requested=one).entry == 1 and served.span((60,), requested=whole).entry == 60
    with pytest.raises(
        ValueError, match="duet_budget=1.0: 576 of 576 visual tokens, but this server allows 64 at most"
    ):
        served.span((576,), requested=whole)
    for bad in (0, -3, 1.5, "64", True, [64]):
        with pytest.raises(ValueError, match="duet_budget="):
            served.asked({"duet_budget": bad})
    with pytest.raises(ValueError, match="has counts of its own"):
        ServedMethod.of({"method": "duet", "dominant": 54, "contextual": 10}, "compact").asked({"duet_budget": 4})


def test_other_settings_are_another_salt() -> None:
    given: list[dict[str, Any]] = [
        {"budget": 64},
        {"budget": 65},
        {"method": "duet_plus", "budget": 64},
        {"budget": 64, "cluster_width": 5},
    ]
    assert (
        len({ServedMethod.of(each, "compact").salt for each in given} | {ServedMethod.of(given[0], "keep").salt}) == 5
    )
    assert ServedMethod.of(given[0], "compact").salt == ServedMethod.of(dict(given[0]), "compact").salt


def test_the_plug_in_has_a_model_for_each_architecture_that_the_command_line_offers() -> None:
    sources = Path(__file__).parent.parent / "plugins" / "vllm" / "src" / "duet_vlm_vllm"
    (places,) = [
        ast.literal_eval(node.value)
        for node in ast.parse((sources / "__init__.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODULES"
    ]
    assert set(places) == set(ARCHITECTURES)
    for place in places.values():
        file, name = place.split(":")
        assert f"class {name}(" in (sources / f"{file}.py").read_text()


# Rows of each picture of plugins/vllm/tests/cases.py, and newlines beside them, by the rules of the families, worked
# out by hand: CLIP at 24 x 24; crops of 4 x 4 patches side by side under a newline a line, what is padding cut off, and
# lines above 1.1 times 9 crops resized (12 x 16 to 10 x 13); tiles of 64 tokens, two of them with an overview; cells of
# 28 x 28 pixels.
SHAPES: dict[str, list[tuple[tuple[int, ...], int]]] = {
    "llava": [((576,), 0)] * 4,
    "llava_next": [((16 + 8 * 8,), 8), ((16 + 4 * 8,), 4), ((16 + 8 * 4,), 8), ((16 + 6 * 8,), 6)],
    "llava_onevision": [((16 + 8 * 8,), 8), ((16 + 4 * 8,), 4), ((16 + 8 * 4,), 8), ((16 + 10 * 13,), 10)],
    "internvl": [((64,), 0), ((64, 64, 64), 0), ((64, 64, 64), 0), ((64,), 0)],
    "qwen": [((8 * 8,), 0), ((12 * 8,), 0), ((4 * 12,), 0), ((4 * 4,), 0)],
}
# Of each clip the steps of time: two frames in cells of 28 x 28 pixels; frames of 4 x 4 patches, halved, with one
# newline behind the last.
CLIPS: dict[str, list[tuple[tuple[int, ...], int]]] = {
    "llava_onevision": [((4,) * 8, 1), ((4,) * 8, 1)],
    "qwen": [((4 * 4,) * 3, 0), ((8 * 4,) * 2, 0)],
}
PLUGIN_TESTS = Path(__file__).parent.parent / "plugins" / "vllm" / "tests"


@pytest.mark.parametrize("family", sorted(path.stem for path in (PLUGIN_TESTS / "references").glob("*.json")))
def test_counts_are_those_that_attach_was_recorded_with(family: str) -> None:
    """The prompts that the plug-in is tested with: text, marks, and of each picture (InternVL: each tile) or clip what
    the settings let in."""
    spec = spec_from_file_location("vllm_cases", PLUGIN_TESTS / "cases.py")
    assert spec and spec.loader
    cases: Any = module_from_spec(spec)
    spec.loader.exec_module(cases)
    answers = json.loads((PLUGIN_TESTS / "references" / f"{family}.json").read_text())["answers"]
    layout, asked = "qwen" if family.startswith("qwen") else family, cases.prompts(family)
    order = [picture.tobytes() for picture in asked["two"][1] + asked["three"][1]]
    seen = dict(zip(order, [SHAPES[layout][i] for i in (0, 1, 2, 0, 3)], strict=True))
    clip_mark = 0
    if family in cases.CLIPS:
        order = [frames.tobytes() for frames, _ in asked["picture between clips"][2]]
        seen |= dict(zip(order, reversed(CLIPS[layout]), strict=True))
        clip_mark = len(asked["clip"][0]) - len(asked["no picture"][0])
    text = answers["duet/no picture"][0] - len(asked["no picture"][0])  # bytes, but for marks
    checked = 0
    for name, settings in cases.METHODS[family].items():
        served = ServedMethod.of(settings, cases.POSITIONS[family])
        for case, (prompt, pictures, clips) in asked.items():
            entered = (
                sum(cases.STAMP * len(seen[frames.tobytes()][0]) for frames, _ in clips) if family == "qwen3_vl" else 0
            )
            for shown in [*pictures, *(frames for frames, _ in clips)]:
                sizes, newlines = seen[shown.tobytes()]
                spans = [((size,), 0) for size in sizes] if family == "internvl" else [(sizes, newlines)]
                entered += cases.BESIDE[family] + sum(served.span(*span).entry for span in spans)
            words = len(prompt) - len(pictures) * (len(asked["two"][0]) - len(asked["one"][0])) - len(clips) * clip_mark
            assert answers[f"{name}/{case}"][0] == text + words + entered, f"{name}/{case}"
            checked += 1
    assert checked == len(answers) == 8 * (10 if family in cases.CLIPS else 7)


@pytest.fixture(scope="module")
def plug_in() -> Any:
    """The module that vLLM loads names vLLM in functions only."""
    spec = spec_from_file_location("plug_in", PLUGIN_TESTS.parent / "src" / "duet_vlm_vllm" / "__init__.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.1"])
def test_a_vllm_that_was_tested_says_nothing(plug_in: Any, version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plug_in.check_version(version)


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "0.34.0rc1", "1.0.0", "dev"])
def test_another_vllm_warns(plug_in: Any, version: str) -> None:
    with pytest.warns(UserWarning, match=rf"tested with vLLM 0.32, and this is {version}: check answers"):
        plug_in.check_version(version)


# ---- rows


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_a_span_in_a_batch_becomes_what_it_becomes_alone(name: str) -> None:
    torch.manual_seed(0)
    served = ServedMethod.of({"method": name, "budget": 9}, "keep")
    rows = [torch.randn(n, 8) for n in (16, 25, 9, 4)]
    parts = [
        torch.zeros(16).long(),
        torch.tensor([0] * 12 + [-1] + [1] * 12),
        torch.zeros(9).long(),
        torch.zeros(4).long(),
    ]
    signals = [torch.rand(len(row)) for row in rows], [torch.randn(len(row), 6) for row in rows]
    asked = [NOTHING_ASKED, NOTHING_ASKED, 6.0, NOTHING_ASKED]  # the third asks for five
    together = reduce_rows(served, rows, parts, asked, signals)
    for i, (kept, source) in enumerate(together):
        ((alone, place),) = reduce_rows(
            served, rows[i : i + 1], parts[i : i + 1], asked[i : i + 1], ([signals[0][i]], [signals[1][i]])
        )
        assert torch.equal(source, place) and torch.allclose(kept, alone, atol=1e-6)
        assert len(kept) == [9, 9, 5, 4][i] == served.span(*part_sizes(parts[i]), asked[i]).entry
        assert source.tolist() == sorted(set(source.tolist())) and not (parts[i][source] < 0).any()
    assert torch.equal(together[3][0], rows[3])  # smaller than the budget: whole


def test_a_clip_is_known_by_its_steps() -> None:
    """Three steps of four rows, of which one changes from the first to the second step, and another from there to the
    third."""
    step = torch.eye(4)
    second = step.clone()
    second[1] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    third = second.clone()
    third[3] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    rows, parts = [torch.cat([step, second, third])], [torch.arange(3).repeat_interleave(4)]
    served = ServedMethod.of({"method": "frames", "budget": 6}, "keep")
    ((kept, source),) = reduce_rows(served, rows, parts, [NOTHING_ASKED], None, stream="video")
    assert source.tolist() == [0, 1, 2, 3, 5, 11] and torch.equal(kept, rows[0][source])
    ((_, still),) = reduce_rows(served, rows, parts, [NOTHING_ASKED], None)
    assert still.tolist() != source.tolist()


def test_a_method_without_its_signals_is_an_error() -> None:
    served = ServedMethod.of({"budget": 4}, "compact")
    with pytest.raises(RuntimeError, match="duet ranks by the attention of the vision tower"):
        reduce_rows(served, [torch.randn(9, 4)], [torch.zeros(9).long()], [NOTHING_ASKED], None)


# ---- the command line


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """The command that would have been started in place of this process; vLLM and the plug-in are said to be there."""
    found: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr("duet_vlm.cli.serve.find_spec", lambda name: name)
    monkeypatch.setattr("os.execve", lambda program, command, environment: found.append((command, environment)))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return found


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_serve_starts_vllm_with_the_settings(started: list[Any]) -> None:
    done = call(
        "serve",
        "-m",
        "tiny",
        "--budget",
        "22%",
        "--port",
        str(free_port()),
        "--api-key",
        "k",
        "--",
        "--max-model-len",
        "99",
    )
    assert done.exit_code == 0, done.output
    ((command, environment),) = started
    assert option(command, "--served-model-name") == "tiny" and option(command, "--model") == str(tiny.path())
    assert option(command, "--host") == "127.0.0.1" and option(command, "--allowed-media-domains") == "none.invalid"
    assert option(command, "--hf-overrides.architectures+") == "DuetLlavaForConditionalGeneration"
    assert (option(command, "--hf-overrides.duet.method"), option(command, "--hf-overrides.duet.budget")) == (
        "duet_plus",
        "0.22",
    )
    assert command[-2:] == ["--max-model-len", "99"] and environment["VLLM_API_KEY"] == "k" and "k" not in command
    # code and files only where vLLM's own options ask for them
    assert not {"--trust-remote-code", "--allowed-local-media-path"} & set(command)
    assert "--trust-request-mm-kwargs" not in command and "--tensor-parallel-size" not in command
    assert "method=duet_plus, budget=0.22" in done.output and "/v1" in done.output and "warning" not in done.output


def test_serve_runs_the_whole_method_where_it_is_asked_to(started: list[Any]) -> None:
    done = call("serve", "-m", "tiny", "--method", "duet", "-b", "16", "--stages", "all", "--port", str(free_port()))
    assert done.exit_code == 0, done.output
    ((command, _),) = started
    assert option(command, "--hf-overrides.duet.stages") == "all" and "--enforce-eager" in command
    assert "a budget is a mean over its layers" in done.output
    assert (
        "an image of 512 visual tokens: 25 enter, 12 from layer 6 on, 0 from layer 9 on; a mean of 15.5 over the layers"
        in done.output
    )
    assert "rows leave before decoder layers 6, 9 of 12; 4 KV-cache groups of 3 layers\n" in done.output


@pytest.mark.parametrize(("method", "told"), [("duet", True), ("divprune", False)])
def test_the_first_stage_says_where_there_is_a_second(started: list[Any], method: str, told: bool) -> None:
    """The default: its budget counts what enters, and only vLLM's stock options are needed."""
    for more in ([], ["--stages", "first"]):
        done = call("serve", "-m", "tiny", "--method", method, "-b", "16", *more, "--port", str(free_port()))
        assert "first stage only, so a budget counts the tokens" in done.output
        assert ("--stages all drops inside the decoder, too" in done.output) == told
    assert len(started) == 2 and not any("--worker-cls" in command for command, _ in started)


def test_a_schedule_that_wastes_memory_is_told_with_the_nearest_that_does_not(started: list[Any]) -> None:
    drop = ["--method", "pyramiddrop", "--set", "schedule=((7, 0.5),)", "--stages", "all"]
    done = call("serve", "-m", "tiny", *drop, "--port", str(free_port()))
    assert (
        "2 KV-cache groups of 7 layers, 2 of them padding that holds memory for nobody; drops before 6 would waste nothing"
        in done.output
    )


def test_serve_opens_what_it_is_asked_to_open(started: list[Any]) -> None:
    port = str(free_port())
    more = ["--request-budgets", "--fetch-urls", "--tensor-parallel-size", "2", "--host", "0.0.0.0"]
    done = call("serve", "-m", "tiny", "-b", "9", "--port", port, *more)
    ((command, _),) = started
    assert (
        "--trust-request-mm-kwargs" in command
        and "--allowed-media-domains" not in command
        and option(command, "--tensor-parallel-size") == "2"
    )
    assert "anyone who reaches" in done.output


def test_the_flags_are_words_that_no_shell_reads(started: list[Any]) -> None:
    done = call("vllm-args", "-m", "tiny", "--method", "visionzip", "--set", "dominant=0.2", "--set", "contextual=5")
    words = "--hf-overrides.architectures+ DuetLlavaForConditionalGeneration --hf-overrides.duet.method visionzip"
    assert done.output.strip() == f"{words} --hf-overrides.duet.dominant 0.2 --hf-overrides.duet.contextual 5"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-m", "tiny"], "needs a budget"),
        (["-m", "tiny", "-b", "9", "--method", "fastv"], "drops inside the decoder"),
        (["-m", "tiny", "-b", "9", "--method", "duett"], "did you mean 'duet'"),
        (["-m", "tiny", "-b", "nine"], "--budget nine"),
        (["-m", "tiny-video", "-b", "9"], "VideoLlavaForConditionalGeneration: vLLM cannot run"),
        (["-m", "nowhere", "-b", "9"], "no such folder"),
        (["-m", "tiny", "-b", "9", "--set", "alpha"], "write it as key=value"),
        (["-m", "tiny", "-b", "9", "--stages", "second"], "stages='second': choose one of 'first', 'all'"),
        (
            ["-m", "tiny", "-b", "9", "--method", "divprune", "--stages", "all"],
            "divprune: it drops nothing inside the decoder",
        ),
    ],
)
def test_what_cannot_be_served_is_one_line(started: list[Any], arguments: list[str], says: str) -> None:
    for verb in ("serve", "vllm-args"):
        done = call(verb, *arguments)
        assert done.exit_code == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not started


def test_a_port_that_is_taken_and_a_machine_without_vllm(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"--port {port}: cannot listen there" in call("serve", "-m", "tiny", "-b", "9", "--port", port).stderr
    monkeypatch.setattr("duet_vlm.cli.serve.find_spec", lambda name: None)
    done = call("serve", "-m", "tiny", "-b", "9")
    assert (
        "vllm and duet-vlm-vllm: not installed here" in done.stderr
        and "docs/serve.md" in done.stderr
        and done.exit_code == 2
    )
    assert not started


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- in a container


def test_examples_start_the_command_with_options_that_it_has() -> None:
    deploy = Path(__file__).parent.parent / "plugins" / "vllm" / "deploy"
    known = {name for each in get_command(app).commands["serve"].params for name in each.opts}  # type: ignore[attr-defined]
    service = yaml.safe_load((deploy / "compose.yaml").read_text())["services"]["duet-vlm"]
    deployment, front = yaml.safe_load_all((deploy / "kubernetes.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    for words in (service["command"], container["args"]):
        assert all(isinstance(word, str) for word in words)
        assert {word for word in words if word.startswith("--")} <= known and "--host" in words
    assert (deploy / "../../.." / service["build"]["dockerfile"]).is_file() and (
        deploy / service["build"]["context"] / "pyproject.toml"
    ).is_file()
    assert "VLLM_API_KEY" in service["environment"] and container["env"][0]["name"] == "VLLM_API_KEY"
    assert (
        front["spec"]["selector"]
        == deployment["spec"]["selector"]["matchLabels"]
        == deployment["spec"]["template"]["metadata"]["labels"]
    )
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]
    }


# ---- transformers' own server


def test_what_is_vllms_is_refused_on_transformers(started: list[Any]) -> None:
    for more in (["--tensor-parallel-size", "2"], ["--request-budgets"], ["--", "--max-model-len", "9"]):
        done = call("serve", "-m", "tiny", "-b", "9", "--backend", "transformers", *more)
        assert done.exit_code == 2 and "are vLLM's, leave them out" in done.stderr
    assert "give 'vllm' or 'transformers'" in call("serve", "-m", "tiny", "-b", "9", "--backend", "sglang").stderr


PART = "data:image/png;base64,AA"
ELSEWHERE = ("http://host/x.png", "/etc/hostname", "file:///etc/hostname", "x.png")


def asking(part: Any, **more: Any) -> bytes:
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "x"}]}]
    return json.dumps({"model": "m", "messages": messages} | more).encode()


def doors(value: Any) -> dict[str, bytes]:
    """Requests that make transformers' server open ``value``, each in another way."""
    image = {"type": "image_url", "image_url": {"url": value}}
    return {
        "chat": asking(image),
        "detail": asking({"type": "image_url", "image_url": {"url": value, "detail": "low"}}),
        "bare": asking({"type": "input_image", "image_url": value}),
        "video": asking({"type": "video_url", "video_url": {"url": value}}),
        "audio": asking({"type": "audio_url", "audio_url": {"url": value}}),
        "responses": json.dumps({"input": [{"type": "input_image", "image_url": value}]}).encode(),
        "turns": json.dumps(
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": value}]}]}
        ).encode(),
        "second": asking({"type": "image_url", "image_url": {"url": PART}}, more=[[image]]),
    }


def test_pictures_that_are_part_of_a_request_are_let_through() -> None:
    assert [remote(body) for body in (*doors(PART).values(), b"", b"{", b"[]", b'{"messages": []}')] == [None] * 12
    spoken = asking({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, audio=None)
    tools = [
        {
            "type": "function",
            "function": {"parameters": {"properties": {"url": {"type": "string"}, "path": {"type": "string"}}}},
        }
    ]
    coded = json.dumps(
        {"state": "a", "assets": {"a": {"type": "image", "format": "png", "data_base64": "iVBORw0KGgoAAAANSUhEUg"}}}
    ).encode()
    assert [remote(body) for body in (spoken, asking({"type": "text", "text": "http://host"}, tools=tools), coded)] == [
        None
    ] * 3


@pytest.mark.parametrize("door", sorted(doors(PART)))
def test_pictures_that_are_not_part_of_a_request_are_found(door: str) -> None:
    for url in ELSEWHERE:
        for value in (url, [url], [[url]], [PART, url], {"url": url}, {"url": [url]}, {"no": url}, [{"url": url}]):
            assert url in (remote(doors(value)[door]) or ""), value
    for value in (3, True, [], {}, [PART], {"url": [PART]}):  # neither a text nor an object with one
        assert remote(doors(value)[door]) is not None


def test_other_doors_to_what_is_elsewhere() -> None:
    """Arguments of the processor, sounds without a format, and assets are opened as well."""
    for url in ELSEWHERE:
        bodies = [
            asking({}, chat_template_kwargs={"processor_kwargs": {"images": url}}),
            asking({}, chat_template_kwargs={"images": [url]}),
            asking({"type": "input_audio", "input_audio": {"data": url}}),
            asking({"type": "input_audio", "input_audio": url}),
            asking({"type": "image", "path": url}),
            json.dumps(
                {"state": "a", "questions": {}, "assets": {"a": {"type": "image", "data_base64": url}}}
            ).encode(),
        ]
        assert [url in (remote(body) or "") for body in bodies] == [True] * len(bodies)


def guarded(
    body: bytes, *headers: tuple[bytes, bytes], path: str = "/v1/chat/completions", fails: Exception | None = None
) -> tuple[int, str]:
    """Status and answer of an application behind the guard, by ASGI itself. The request comes in pieces of 10 MB."""
    sent: list[Any] = []
    pieces = [body[start : start + 10_000_000] for start in range(0, max(1, len(body)), 10_000_000)]

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        if fails is not None:
            raise fails
        read = (await receive())["body"] if path != "/health" else b""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside, %d" % len(read)})

    async def receive() -> Any:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"host", b"127.0.0.1"), *headers]}
    asyncio.run(Guard(inside, "k", False)(scope, receive, send))
    return sent[0]["status"], sent[1]["body"].decode()


KEY = (b"authorization", b"Bearer k")


def test_no_header_opens_the_guard() -> None:
    for host in (b"x/health?", b"x/health#", b"127.0.0.1/health?", b"user@x/health?"):
        assert guarded(doors(PART)["chat"], (b"host", host))[0] == 401
        assert guarded(doors("http://host/x.png")["chat"], (b"host", host), KEY)[0] == 400
    assert guarded(b"", (b"authorization", "Bearer \u00e9".encode()))[0] == guarded(b"", path="//health")[0] == 401
    assert guarded(b"", path="/health") == (200, "inside, 0") and guarded(doors(PART)["chat"], KEY)[0] == 200


def test_requests_that_are_too_deep_or_too_large() -> None:
    for body in (b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 400 + b"1" + b"}" * 400, b"[" * 102 + b"]" * 102):
        status, said = guarded(body, KEY)
        assert status == 400 and "nested deeper than 100" in said
    assert guarded(b"[" * 90 + b"]" * 90, KEY)[0] == 200
    large = asking({"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 60_000_000}})
    assert guarded(large, KEY) == (200, f"inside, {len(large)}")
    status, said = guarded(b"A" * 100_000_001, KEY)
    assert status == 413 and "more than 100 MB" in said


def test_an_error_that_quotes_the_request_is_not_logged_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr("duet_vlm.cli.serve_transformers.log.error", lambda text, *words: logged.append(text % words))
    for error, status in ((ValueError("no picture: " + "A" * 60_000_000), 400), (RuntimeError("B" * 60_000_000), 500)):
        found, said = guarded(b"{}", KEY, fails=error)
        assert found == status and len(said) < 1000
    # where it failed is said
    assert len(logged) == 2 and all("in inside" in text and len(text) < 3000 for text in logged)


def test_a_request_of_the_wrong_form_is_no_fault_of_the_server() -> None:
    """A key that the server's own code does not find in a request is the request's fault; the same error from elsewhere
    is not."""

    def failing(module: str, wrong: Any) -> Exception:
        held: dict[str, Any] = {"__name__": module}
        exec("def take_apart(part): return part['type']", held)
        try:
            held["take_apart"](wrong)
        except (LookupError, TypeError) as error:
            return error
        raise AssertionError("it was found")

    for wrong, words in (({}, "KeyError: 'type'"), (3, "TypeError: 'int' object is not subscriptable")):
        status, said = guarded(b"{}", KEY, fails=failing("transformers.cli.serving.utils", wrong))
        assert status == 400 and f"not a request as OpenAI's API has it: {words}" in json.loads(said)["error"]
        assert guarded(b"{}", KEY, fails=failing("transformers.generation.utils", wrong))[0] == 500


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nno sound\r\n--x--\r\n'],
)
def test_transcriptions_are_refused_in_one_sentence(body: bytes) -> None:
    status, said = guarded(body, KEY, path="/v1/audio/transcriptions")
    assert status == 400 and "transcribes no sound" in said
    assert guarded(body, path="/v1/audio/transcriptions")[0] == 401


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """transformers' server with the embedded model and a key: its port, and its log."""
    port, log = free_port(), tmp_path_factory.mktemp("served") / "log"
    command = [
        sys.executable,
        "-m",
        "duet_vlm.cli.main",
        "serve",
        "-m",
        "tiny",
        "--method",
        "duet",
        "-b",
        "16",
        "--backend",
        "transformers",
    ]
    source = str(Path(duet_vlm.__file__).parents[1])
    with log.open("w") as file:
        run = [*command, "--port", str(port), "--api-key", "k"]
        process = subprocess.Popen(
            run, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": source, "HF_HUB_OFFLINE": "1"}
        )
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-2000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            time.sleep(0.5)
        yield port, log
    finally:
        process.terminate()
        process.wait(60)


needs_serving = pytest.mark.skipif(
    any(find_spec(name) is None for name in NEEDED), reason="needs transformers[serving]"
)


def encoded(image: Any) -> str:
    held = io.BytesIO()
    image.save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


@needs_serving
def test_transformers_serves_both_stages(served: tuple[int, Path]) -> None:
    """The answer is that of ``attach``; other models, URLs and strangers are refused, and the server goes on."""
    import openai

    port, item = served[0], tiny.sample("test", 1, 0)
    picture = encoded(item.image)

    def ask(url: str, key: str = "k", model: str = str(tiny.path())) -> Any:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)
        content: Any = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": item.question}]
        return client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": content}], max_tokens=4, temperature=0
        )

    model, processor = tiny.load()
    inputs = processor(images=item.image, text=tiny.prompt(item.question), return_tensors="pt")
    with duet_vlm.attach(model, "duet", budget=16):
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    expected = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert ask(picture).choices[0].message.content.strip() == expected
    with pytest.raises(openai.AuthenticationError):
        ask(picture, key="another")
    for wrong in ({"url": "http://127.0.0.1:1/x.png"}, {"url": "/etc/hostname"}, {"url": picture, "model": "gpt2"}):
        with pytest.raises(openai.BadRequestError):
            ask(**wrong)
    assert ask(picture).choices[0].message.content.strip() == expected


@needs_serving
def test_a_real_server_fetches_nothing_and_logs_little(served: tuple[int, Path]) -> None:
    """Raw requests, by every door and with hostile headers: nothing arrives at a listener, no file is opened, the log
    stays small."""
    port, log = served
    arrived: list[str] = []
    held = io.BytesIO()
    tiny.sample("test", 1, 0).image.save(held, "PNG")

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            arrived.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(held.getvalue())

        def log_message(self, *words: Any) -> None:
            pass

    def ask(
        body: bytes, key: str | None = "k", host: str = "127.0.0.1", path: str = "/v1/chat/completions"
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.putrequest("POST", path, skip_host=True)
        headers = {"Host": host, "Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, value in (headers if key is None else headers | {"Authorization": f"Bearer {key}"}).items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read()

    def named(body: bytes) -> bytes:
        return json.dumps(json.loads(body) | {"model": str(tiny.path()), "max_tokens": 2}).encode()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{listener.server_address[1]}/x.png"
        for value in (
            url,
            [url],
            {"url": [url]},
            [[url]],
            str(tiny._HERE / "demo" / "scene_1.png"),
            [str(tiny._HERE / "demo" / "scene_1.png")],
        ):
            for door, body in doors(value).items():
                path = "/v1/responses" if b'"input"' in body else "/v1/chat/completions"
                assert ask(named(body), path=path)[0] == 400, (door, value)
        for kwargs in ({"processor_kwargs": {"images": url}}, {"images": url}):
            assert ask(named(asking({"type": "text", "text": "x"}, chat_template_kwargs=kwargs)))[0] == 400
        for host in ("x/health?", "x/health#", f"127.0.0.1:{port}/health?"):
            assert ask(named(doors(url)["chat"]), key=None, host=host)[0] == 401
            assert ask(named(doors(url)["chat"]), host=host)[0] == 400
        listener.shutdown()
    assert not arrived
    path = str(tiny._HERE / "demo" / "scene_1.png")
    for sound in ({"data": path}, {"data": path, "format": "wav"}):
        for part in ({"input_audio": sound}, {"type": "input_audio", "input_audio": sound}):
            assert ask(named(asking(part)))[0] == 400, part
    bare = [b"{}", b'{"messages": 3}', b'{"messages": [3]}', b'{"messages": [{"content": "x"}]}']
    for wrong in (*bare, asking({}), asking({"type": "text"}), asking(3)):
        assert ask(named(wrong))[0] == 400, wrong
    assert ask(b"{}", path="/v1/audio/transcriptions")[0] == 400
    assert ask(b"[" * 100_000 + b"]" * 100_000)[0] == 400
    status, said = ask(named(doors("data:image/png;base64," + "A" * 60_000_000)["chat"]))
    assert status == 400 and len(said) < 1000
    assert ask(b"A" * 100_000_001)[0] == 413
    assert ask(named(doors(encoded(tiny.sample("test", 1, 0).image))["chat"]))[0] == 200
    assert log.stat().st_size < 200_000


def test_the_page_on_serving_shows_a_request_that_is_whole() -> None:
    """The shell writes it out as it stands on the page: JSON of OpenAI's API, with the picture in it."""
    import base64
    import json
    import subprocess

    root = PLUGIN_TESTS.parent.parent.parent
    (command,) = [
        block for block in (root / "docs/serve.md").read_text().split("```bash\n") if block.startswith("curl")
    ]
    done = subprocess.run(
        ["bash", "-c", "curl() { cat; }\n" + command.split("```")[0]],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    body = json.loads(done.stdout)
    picture, question = body["messages"][0]["content"]
    kind, _, content = picture["image_url"]["url"].partition(",")
    assert (
        kind == "data:image/png;base64"
        and base64.b64decode(content) == (root / "src/duet_vlm/evaluation/tiny/demo/scene_1.png").read_bytes()
    )
    assert question["text"] == "What shape is the yellow object?" and {"model", "max_tokens", "messages"} == set(body)
